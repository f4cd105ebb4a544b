"""What a file that is not safetensors really is, and how to make it one."""

_PICKLE = (
    "load it with `torch.load(path, weights_only=True)` where you trust the file, then save it with "
    "`safetensors.torch.save_file`"
)
_EXTRACT = "extract it and upload `adapter_model.safetensors` itself"
_GGUF = "upload the PEFT folder that the GGUF file was converted from"
_HTML = "download the file itself: this is a web page, often a login or error page"
_LFS = "run `git lfs pull` and upload the file that the pointer stands for"
_SAVE = "save the adapter with PEFT's `save_pretrained`, which writes safetensors"

# first bytes -> (what it is, what to do)
_MAGIC = {
    b"GGUF": ("a GGUF file", _GGUF),
    b"PK\x03\x04": ("a zip archive or a torch checkpoint", f"if it is a checkpoint, {_PICKLE}"),
    b"PK\x05\x06": ("an empty zip archive", _EXTRACT),
    b"\x1f\x8b": ("a gzip file", _EXTRACT),
    b"BZh": ("a bzip2 file", _EXTRACT),
    b"\xfd7zXZ\x00": ("an xz file", _EXTRACT),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", _EXTRACT),
    b"\x28\xb5\x2f\xfd": ("a zstandard file", _EXTRACT),
    b"version https://git-lfs": ("a Git LFS pointer", _LFS),
    b"\x93NUMPY": ("a NumPy array", _SAVE),
    b"\x89HDF": ("an HDF5 file", _SAVE),
}
_PICKLE_STARTS = tuple(bytes([0x80, protocol]) for protocol in range(1, 6))
SNIFF_BYTES = 512


def sniff(start: bytes) -> tuple[str, str] | None:
    """What the first `SNIFF_BYTES` of a file show it to be, and how to convert it; None for safetensors or unknown.

    A safetensors file opens with the header's length, whose first bytes may equal any short magic: only the `{`
    in the ninth byte tells, so that is asked first.
    """
    if not start:
        return "an empty file", _SAVE
    if start[8:9] == b"{":
        return None
    for magic, answer in _MAGIC.items():
        if start.startswith(magic):
            return answer
    if start.startswith(_PICKLE_STARTS):
        return "a pickle (old torch checkpoint)", _PICKLE
    if start[257:262] == b"ustar":
        return "a tar archive", _EXTRACT
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "an HTML or XML page", _HTML
    if text.startswith((b'{"', b"{\n", b"{\r", b"[")):
        return "a JSON text", _SAVE
    return None
