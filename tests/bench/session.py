"""One run of the bench: its options, the base model, and the folders it works in."""

from pathlib import Path

import torch

from server.model.base import BaseModel
from server.model.loader import load_base_model
from tests.bench.adapters import write_adapters
from tests.bench.options import Options
from tests.bench.our_server import OurServer
from tests.bench.results import Results


class Session(Results):
    """`adapters`: the folders of "distinct-8"; `base_folder`: the base model as Hugging Face's libraries read it."""

    def __init__(self, options: Options, scratch: Path) -> None:
        super().__init__()
        self.options = options
        self.scratch = scratch
        self.base: BaseModel = load_base_model(options.model, dtype=torch.bfloat16)
        # What peers make of the model (a folder, an export) is kept between runs.
        self.work = (options.out / "work" / self.base.fingerprint[:16]).absolute()
        self.base_folder = self.work / "base"
        if not self.base_folder.is_dir():
            self.base.model.save_pretrained(self.base_folder)
            self.base.tokenizer.save_pretrained(self.base_folder)
        self.adapters = scratch / "adapters"
        self.folders = list(write_adapters(self.adapters, self.base.model))

    def server(self, name: str, *options: str, preload: Path | None = None) -> OurServer:
        """One of our servers, of the first kind that was asked for."""
        kind = ("--quantize", self.options.quantize[0], "--dtype", self.options.dtype[0])
        return self.server_of(name, *kind, *options, preload=preload)

    def server_of(self, name: str, *options: str, preload: Path | None = None) -> OurServer:
        return OurServer(name, self.options.model, self.scratch, *options, *self.options.serve, preload=preload)
