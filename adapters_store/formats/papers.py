"""The papers whose methods this server was built for, and PEFT's types: which of our methods serves each, or why none.

What a method itself says (status, note, source) stands with the method only.
"""

from dataclasses import dataclass
from typing import Literal

Status = Literal["native", "folded", "declined"]

_PLAIN = "A LoRA as PEFT writes it."


@dataclass(frozen=True, slots=True)
class Paper:
    """kinds: our methods (`Method.kind`) that serve it; peft_type: what `methods.DECLINED` refuses of it; with neither,
    status and note say what becomes of it."""

    name: str
    source: str
    kinds: tuple[str, ...] = ()
    status: Status = "declined"
    note: str = ""
    peft_type: str | None = None


def _by(name: str, source: str, *kinds: str) -> Paper:
    return Paper(name, source, kinds)


def _lora(name: str, source: str, note: str = _PLAIN) -> Paper:
    return Paper(name, source, (), "native", note)


def _refused(name: str, source: str, peft_type: str) -> Paper:
    return Paper(name, source, peft_type=peft_type)


def _none(name: str, source: str, note: str) -> Paper:
    return Paper(name, source, (), "declined", f"{note} No adapter comes of it.")


PAPERS: tuple[Paper, ...] = (
    _by("SoRA", "arXiv 2311.11696", "sora"),
    _by("RandLoRA", "arXiv 2502.00987", "randlora"),
    _lora("DiffoRA", "arXiv 2502.08905", "A LoRA as PEFT writes it, on some of the modules."),
    _by("NOLA", "arXiv 2310.02556", "nola"),
    _lora("CoDyRA", "arXiv 2412.01004", "A LoRA as PEFT writes it, with a rank for each module."),
    _by("LoLDU", "arXiv 2410.13618", "loldu"),
    _by("Hydra", "arXiv 2309.06922", "hydra"),
    _by("TLoRA", "arXiv 2501.08727", "tlora"),
    _refused("SLTrain", "arXiv 2406.02214", "SLTRAIN"),
    _by("LoRA-SB", "arXiv 2411.19557", "lora_sb"),
    _by("SALT", "arXiv 2503.16055", "salt"),
    _by("ALLoRA", "arXiv 2410.09692", "allora"),
    _by("Block-LoRA", "arXiv 2501.16720", "block_lora"),
    _by("IncreLoRA", "arXiv 2308.12043", "increlora"),
    _by("LoRAM", "arXiv 2502.13533", "loram"),
    _by("SVFit", "arXiv 2409.05926", "svfit"),
    _lora("ICM-LoRA", "arXiv 2501.17635", "Generators are kept (`/generators`), adapters stored as recipes."),
    _by("PETALface", "arXiv 2412.07771", "petalface"),
    _refused("PELA", "arXiv 2310.10700", "PELA"),
    _by("GaLore", "arXiv 2403.03507", "full_delta"),
    _none("LoRA vs Full Fine-tuning", "arXiv 2410.21228", "An analysis of LoRAs."),
    _lora("LoRA-Pro", "arXiv 2407.18242"),
    _lora("LoRA-LEGO", "arXiv 2409.16167", "A merge of LoRAs, which gives a LoRA."),
    _by("DyLoRA", "arXiv 2210.07558", "dylora"),
    _by("SMoRA", "arXiv 2501.15103", "smora"),
    _refused("WaRA", "arXiv 2506.24092", "WARA"),
    _none("Computational limits of LoRA", "arXiv 2406.03136", "Theory."),
    _none("SSVI", "arXiv 2402.11025", "Sparse Bayesian networks."),
    _by("SVD-free (DCT) low-rank optimiser", "arXiv 2505.17967", "full_delta"),
    _by("TriAdaptLoRA", "arXiv 2501.08008", "triadaptlora"),
    _by("SaRA", "arXiv 2409.06633", "sara"),
    _lora("BA-LoRA", "arXiv 2408.04556", "A LoRA as PEFT writes it; one begun as PiSSA has twice the rank here."),
    _none("NIW-Meta", "arXiv 2306.09702", "Few-shot learning."),
    _lora("LoRA-GGPO", "arXiv 2502.14538"),
    _refused("WeLore", "arXiv 2407.11239", "WELORE"),
    _lora("LoRA-GA", "arXiv 2407.05000", "A LoRA as PEFT writes it, once PEFT has converted it to the original base."),
    _refused("LQ-LoRA", "arXiv 2311.12023", "LQ_LORA"),
    _lora("LoKU", "arXiv 2408.06621", "A LoRA as PEFT writes it, once it is converted to the original base."),
    _none("NBPO", "recommender systems", "A sampler of training data."),
    _lora("CoLoRA", "arXiv 2408.01099", "A LoRA as PEFT writes it, with a rank for each module; no convolutions."),
    _lora("FedSVD", "arXiv 2505.12805"),
    _lora(
        "EoRA",
        "arXiv 2410.21271",
        "A LoRA as PEFT writes it; it runs below another adapter where a request names both.",
    ),
    _by("LaMDA", "arXiv 2406.12832", "lamda"),
    _none("DECOR", "text-to-image models", "It projects the embeddings of prompts."),
    _none("LAME", "arXiv 2201.05718", "Adaptation at test time of classifiers."),
    _by("OwLore", "arXiv 2405.18380", "full_delta"),
    _by("FRUGAL", "arXiv 2411.07837", "full_delta"),
    _by("Bone", "arXiv 2409.15371", "bone"),
    _by("LISA", "arXiv 2403.17919", "full_delta"),
    _none("alpha-BN", "arXiv 2110.04065", "Batch norms at test time."),
)
