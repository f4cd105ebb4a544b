"""Tensor operations of Polyrank: adapter products and paged attention.

Import `kernels.dispatch`, the one door; nothing is loaded here, because transformers probes for a
package of this name (a Hugging Face package shares it) and may import it as a side effect.
"""

__version__ = "0.0.0"
