"""An API key: what it may do, for which tenant, and how it is kept.

A key is `pr_`, eight characters that are its id for people and lists, and 256 random bits. Only its SHA-256 is kept:
what is that random needs no slow hash.
"""

from typing import Literal, get_args

Scope = Literal["generate", "adapters:read", "adapters:write", "admin", "metrics"]
SCOPES: frozenset[Scope] = frozenset(get_args(Scope))
PUBLIC = "public"  # the tenant whose adapters everybody may read
