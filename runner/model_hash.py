"""A name for the content of a model's files. Knows no format but where the tensors lie."""

import hashlib
from bisect import bisect_right
from itertools import accumulate
from typing import Any

from quant.gguf_file import ByteRange, GGUFFile

_N_HASHED_BLOCKS, _HASHED_BLOCK_BYTES = 256, 4096


def model_hash(file: GGUFFile) -> str:
    """A name for the model's content, hex: SHA-256 over the size of the files, their headers and
    256 blocks of 4 KiB spread over the tensors.

    Quick, and different for another model, another quantization and most edits. Raises GGUFError
    or OSError when the file cannot be read any more.
    """
    digest = hashlib.sha256(b"%d," % file.size_bytes)
    tensors = sorted(file.tensors.values(), key=lambda tensor: (tensor.shard, tensor.offset))
    end_of_shard = {tensor.shard: tensor.offset + tensor.n_bytes for tensor in tensors}
    for shard, path in enumerate(file.paths):
        starts = [tensor.offset for tensor in tensors if tensor.shard == shard]
        _hash_bytes(digest, file, ByteRange(shard, 0, starts[0] if starts else path.stat().st_size))
    ends = list(accumulate(tensor.n_bytes for tensor in tensors))
    for i in range(_N_HASHED_BLOCKS if ends else 0):
        position = i * ends[-1] // _N_HASHED_BLOCKS
        tensor = tensors[at := bisect_right(ends, position)]
        start = tensor.offset + position - (ends[at] - tensor.n_bytes)
        n_bytes = min(_HASHED_BLOCK_BYTES, end_of_shard[tensor.shard] - start)
        _hash_bytes(digest, file, ByteRange(tensor.shard, start, n_bytes))
    return digest.hexdigest()


def _hash_bytes(digest: Any, file: GGUFFile, part: ByteRange) -> None:
    data = bytearray(part.n_bytes)
    file.read(part, data)
    digest.update(data)
