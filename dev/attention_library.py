#!/usr/bin/env python3
"""acp_attention.cuh for PyTorch tensors, so that it and its peers run in one process on the same data.

    library = AttentionLibrary()                            # compiles cuda/attention.cu where it is not compiled yet
    attention = library.attention(B, T, H, D, "paper")      # allocates outputs and work space
    o = attention.forward(q, k, v, log_f)                   # enqueued on PyTorch's current stream
    dq, dk, dv, dlog_f = attention.backward(dout)

The shared library is build/attention/ARCH-HASH.so, HASH of all that it is made of; nvcc takes about ten seconds. The
variable FOX_ATTENTION names another one, compiled elsewhere. From the command line, to compile it and print its path:

    python3 dev/attention_library.py [--arch 90a]
"""

import argparse
import ctypes
import hashlib
import os
import pathlib
import re
import shutil
import subprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCE = "cuda/attention.cu"
MODES = ("off", "paper", "tight")  # in the order of AcpMode
BLOCK = 128  # ACP_BLOCK


# ---- the shared library


def sources():
    """{path below the root: text} of the source file and of all that it includes from here."""
    found, waiting = {}, [ROOT / SOURCE]
    while waiting:
        path = waiting.pop()
        name = str(path.relative_to(ROOT))
        if name not in found:
            found[name] = path.read_text()
            for include in re.findall(r'^\s*#\s*include\s+"([^"]+)"', found[name], re.MULTILINE):
                places = [(folder / include).resolve() for folder in (path.parent, ROOT)]
                waiting += [place for place in places if place.is_file()][:1]
    return found


def find_nvcc():
    places = [shutil.which("nvcc"), os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")]
    for place in filter(None, places):
        if os.access(place, os.X_OK):
            return place
    raise SystemExit("nvcc not found; put it on PATH, set CUDA_HOME, or name a compiled library in FOX_ATTENTION")


def build(arch="90a"):
    """Compiles the library for one chip, unless it is there already; returns its path."""
    flags = ["-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", "-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    digest = hashlib.sha256(repr((flags, sorted(sources().items()))).encode()).hexdigest()[:16]
    path = ROOT / "build" / "attention" / f"{arch}-{digest}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")
        done = subprocess.run(
            [find_nvcc(), *flags, SOURCE, "-o", str(fresh)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode != 0:
            raise SystemExit(f"{SOURCE} does not compile:\n{done.stdout[-4000:]}")
        os.replace(fresh, path)
    return path


class AcpShape(ctypes.Structure):
    """cuda/launchers.h"""

    _fields_ = [
        ("B", ctypes.c_int),
        ("T", ctypes.c_int),
        ("H", ctypes.c_int),
        ("D", ctypes.c_int),
        ("mode", ctypes.c_int),
        ("log_tolerance", ctypes.c_double),
        ("shared_norm", ctypes.c_bool),
        ("portable", ctypes.c_bool),
    ]


class AcpCounts(ctypes.Structure):
    _fields_ = [("skipped", ctypes.c_void_p), ("total", ctypes.c_void_p)]


class AttentionLibrary:
    """The launchers. arch: of the chip here, where none is given."""

    def __init__(self, arch=None):
        path = os.environ.get("FOX_ATTENTION") or build(arch or self._arch_here())
        self.path = pathlib.Path(path)
        self.code = ctypes.CDLL(str(self.path.resolve()))
        shape, pointer, stride = ctypes.POINTER(AcpShape), ctypes.c_void_p, ctypes.c_int64
        views = [ctypes.POINTER(ctypes.c_void_p)] * 3
        self._declare("acp_saved_bytes", ctypes.c_int64, shape)
        self._declare("acp_workspace_bytes", ctypes.c_int64, shape)
        self._declare("acp_saved_views", None, shape, pointer, *views)
        self._declare(
            "acp_attention_forward", None, shape, *[pointer] * 4, ctypes.POINTER(AcpCounts), *[pointer] * 3, stride, *[pointer] * 4
        )
        self._declare("acp_attention_backward", None, shape, *[pointer] * 10, stride, *[pointer] * 3)

    def _declare(self, name, result, *arguments):
        function = getattr(self.code, name)
        function.restype, function.argtypes = result, arguments

    @staticmethod
    def _arch_here():
        import torch

        major, minor = torch.cuda.get_device_capability()
        return f"{major}{minor}" + ("a" if major == 9 else "")

    def attention(self, *shape, **options):
        return Attention(self, *shape, **options)


# ---- attention of one shape


class Attention:
    """Forward and backward, with their memory: two of these can be in use at once. Tensors, all on the GPU:
    q, k, v, o, dout and their gradients bf16 [B, T, H, D], log_f and dlog_f float32 [B, H, T].

    mode: off, paper or tight. norms: a pair of QK-norm weights, float32 [H * D] (or [D]: shared by the heads), that
    bound the logits; without them `paper` measures the norms of q and k. portable: the kernels for every chip."""

    def __init__(self, library, B, T, H, D, mode="off", log_tolerance=-10.0, norms=None, portable=False, device="cuda"):
        import torch

        self.torch, self.code, self.norms = torch, library.code, norms
        shared = norms is not None and norms[0].numel() == D and H > 1
        self.shape = AcpShape(B, T, H, D, MODES.index(mode), log_tolerance, shared, portable)
        if norms is not None:
            assert all(w.dtype == torch.float32 and w.is_contiguous() for w in norms)
            assert all(w.numel() == (D if shared else H * D) for w in norms)

        def bf16():
            return torch.empty(B, T, H, D, dtype=torch.bfloat16, device=device)

        def float32():
            return torch.empty(B, H, T, dtype=torch.float32, device=device)

        def memory(count):
            return torch.empty(count, dtype=torch.uint8, device=device)

        self.o, self.dq, self.dk, self.dv = (bf16() for _ in range(4))
        self.lse, self.dlog_f = float32(), float32()
        self.saved = memory(self.code.acp_saved_bytes(self.shape))
        self.work = memory(self.code.acp_workspace_bytes(self.shape))
        self.counts = torch.zeros(2, H, dtype=torch.int64, device=device)
        self.inputs = None

    def _stride(self, x):
        """Elements from token to token; heads must be neighbours, sequences T tokens apart."""
        s = self.shape
        assert x.shape == (s.B, s.T, s.H, s.D) and x.dtype == self.torch.bfloat16 and x.is_cuda == self.o.is_cuda
        stride = x.stride(1) if s.T > 1 else x.stride(0) if s.B > 1 else s.H * s.D  # of one token it means nothing
        assert x.stride(3) == 1 and (s.H == 1 or x.stride(2) == s.D) and (s.B == 1 or x.stride(0) == s.T * stride)
        return stride

    def _stream(self):
        return self.torch.cuda.current_stream().cuda_stream

    def forward(self, q, k, v, log_f, count=False):
        """o. It is overwritten by the next call. count: blocks are counted for kept()."""
        s, counts = self.shape, None
        stride = self._stride(q)
        assert self._stride(k) == stride and self._stride(v) == stride
        assert log_f.shape == (s.B, s.H, s.T) and log_f.dtype == self.torch.float32 and log_f.is_contiguous()
        if count:
            self.counts.zero_()
            counts = AcpCounts(self.counts[0].data_ptr(), self.counts[1].data_ptr())
        norms = [None if self.norms is None else w.data_ptr() for w in self.norms or (None, None)]
        self.inputs = (q, k, v, log_f)
        self.code.acp_attention_forward(
            s,
            self.o.data_ptr(),
            self.lse.data_ptr(),
            self.saved.data_ptr(),
            self.work.data_ptr(),
            counts,
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            stride,
            log_f.data_ptr(),
            *norms,
            self._stream(),
        )
        return self.o

    def backward(self, dout):
        """dq, dk, dv, dlog_f for the inputs of the last forward. They are overwritten by the next call."""
        s, (q, k, v, _) = self.shape, self.inputs
        assert dout.shape == (s.B, s.T, s.H, s.D) and dout.dtype == self.torch.bfloat16 and dout.is_contiguous()
        self.code.acp_attention_backward(
            s,
            self.dq.data_ptr(),
            self.dk.data_ptr(),
            self.dv.data_ptr(),
            self.dlog_f.data_ptr(),
            self.saved.data_ptr(),
            self.work.data_ptr(),
            dout.data_ptr(),
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            self._stride(q),
            self.o.data_ptr(),
            self.lse.data_ptr(),
            self._stream(),
        )
        return self.dq, self.dk, self.dv, self.dlog_f

    def kept(self):
        """The fraction of causal blocks that the last counted forward kept."""
        skipped, total = self.counts.sum(1).tolist()
        return 1 - skipped / total

    def ranges(self):
        """The first key block of each query block and the last query block of each key block, int32 [B, H, blocks], as
        the last forward left them."""
        s, pointers = self.shape, [ctypes.c_void_p() for _ in range(3)]
        self.code.acp_saved_views(s, self.saved.data_ptr(), *pointers)
        blocks = (s.T + BLOCK - 1) // BLOCK
        starts = [p.value - self.saved.data_ptr() for p in pointers[1:]]
        return [self.saved[at : at + 4 * s.B * s.H * blocks].view(self.torch.int32).view(s.B, s.H, blocks).clone() for at in starts]

    def poison(self):
        """NaN in all outputs, bytes of ones in the work space: what is not written shows."""
        for x in (self.o, self.lse, self.dq, self.dk, self.dv, self.dlog_f):
            x.fill_(float("nan"))
        for x in (self.saved, self.work):
            x.fill_(255)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="90a", help="the chip, as in sm_90a")
    print(AttentionLibrary(parser.parse_args().arch).path)


if __name__ == "__main__":
    main()
