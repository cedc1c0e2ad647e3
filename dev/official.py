"""The official PyTorch FoX (github.com/zhixuan-lin/forgetting-transformer), loaded for comparison with this program.

The official code is read from a folder that the user names (--official DIR, a clone of the repository) and never
changed on disk. Three things are done to it in memory, so that it runs with current packages:
  - `_tied_weights_keys = {}` and three attributes of the configuration, for transformers 5;
  - RoPE's frequencies are computed again after `from_pretrained`: transformers 5 builds the model without memory and
    does not restore buffers that are not in the file;
  - for a float32 run, attention is replaced by its definition, because the official kernel takes 16-bit inputs only.
`bf16` is the model as its authors train it: float32 weights, bf16 autocast, their Triton kernels.

Nothing here needs PyTorch before an Official is made. The packages are in dev/requirements.txt.
"""

import contextlib
import fnmatch
import glob
import json
import os
import pathlib
import subprocess
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
MAGIC, HEADER_BYTES, DEFAULT_VOCAB = 20240520, 1024, 50257
LOG_TOLERANCE = -10.0  # the default of --log-tolerance
TINY_RATE = "1e-30"  # a learning rate that changes no weight: updates vanish in float32's rounding
TIMING_RATE = "1e-8"  # one that changes none much, whatever is timed
PRO = dict(hidden_ratio=3.5, use_output_gate=True, use_output_norm=True, qk_norm=True, use_k_shift=True, use_v_shift=True)
PRESETS = {
    "fox-pro-125m": dict(hidden_size=768, num_hidden_layers=12, num_heads=12, **PRO),
    "fox-pro-360m": dict(hidden_size=1024, num_hidden_layers=24, num_heads=16, **PRO),
    "fox-pro-760m": dict(hidden_size=1536, num_hidden_layers=24, num_heads=24, **PRO),
}


# ---- shards


def shard_paths(where, pattern="*train*.bin"):
    """The shards a -i option means: a folder (its *train*.bin), a file or a glob; sorted by their bytes."""
    if os.path.isdir(where):
        paths = [os.path.join(where, name) for name in os.listdir(where) if fnmatch.fnmatchcase(name, pattern)]
    else:
        paths = [where] if os.path.exists(where) else glob.glob(where)
    if not paths:
        raise SystemExit(f"{where}: no shards there")
    return sorted(paths, key=os.fsencode)


def open_shard(path):
    """The tokens of a shard (uint16, mapped) and its vocabulary size."""
    header = np.fromfile(path, dtype="<i4", count=4)
    if len(header) < 4 or header[0] != MAGIC or header[1] not in (1, 2):
        raise SystemExit(f"{path}: not a token shard")
    if os.path.getsize(path) != HEADER_BYTES + 2 * int(header[2]):
        raise SystemExit(f"{path}: the header says {header[2]} tokens, the size of the file does not")
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(int(header[2]),))
    return tokens, int(header[3]) or DEFAULT_VOCAB


def window_stride(path, T):
    """Tokens from window to window: T, or T + 1 in a shard of windows that share nothing."""
    return T + (np.fromfile(path, dtype="<i4", count=2)[1] == 2)


def write_shard(path, tokens, vocab_size):
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:4] = MAGIC, 1, len(tokens), vocab_size
    with open(path, "wb") as out:
        out.write(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())


def first_windows(where, T, count):
    """The first `count` windows of T + 1 tokens, in file order, as [count, T + 1] int64; and the vocabulary size."""
    windows, vocab_size = [], None
    for path in shard_paths(where):
        tokens, vocab_size = open_shard(path)
        for start in range(0, len(tokens) - T, window_stride(path, T)):
            if len(windows) < count:
                windows.append(np.array(tokens[start : start + T + 1], dtype=np.int64))
    if len(windows) < count:
        raise SystemExit(f"{where}: {len(windows)} windows of {T} tokens, {count} are needed")
    return np.stack(windows), vocab_size


# ---- our program


def options(**values):
    """Options of a command line: options(T=64, warmup_tokens=0) is ["-T", "64", "--warmup-tokens", "0"]. A list has several
    values."""
    words = []
    for name, value in values.items():
        words += ["-" + name if len(name) == 1 else "--" + name.replace("_", "-")]
        words += map(str, value if isinstance(value, (list, tuple)) else [value])
    return words


def timed_options(T, sequences, tokens, steps, acp):
    """train_fox's options of a run whose steps are timed: `sequences` in a micro-batch, `tokens` in a step; nothing else runs, nothing
    is written, and the weights stay as they are."""
    return options(T=T, b=sequences, d=tokens, x=steps, l=TIMING_RATE, acp=acp, v=0, n=-1, pruning_every=0)


def ours_command(program, checkpoint, data, out, *options):
    """train_fox from a checkpoint folder, as words."""
    return [str(program), "-i", str(data), "-e", str(checkpoint), "-o", str(out), "-n", "0", *map(str, options)]


def ours_records(command, out, code, said):
    """The records of its metrics.jsonl, when it ended with `code` and had said so much."""
    if code != 0:
        raise SystemExit(f"{' '.join(command)}\nended with {code}:\n{said[-2000:]}")
    return [json.loads(line) for line in pathlib.Path(out, "metrics.jsonl").read_text().splitlines()]


def run_ours(program, checkpoint, data, out, *options):
    """Runs train_fox; returns the records of its metrics.jsonl."""
    command = ours_command(program, checkpoint, data, out, *options)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return ours_records(command, out, done.returncode, done.stdout)


def fresh_weights(model, data, out, seed=0):
    """A checkpoint folder below `out` with the weights that train_fox starts from, given these shards and this seed."""
    folder = pathlib.Path(out, "step_00000000")
    folder.mkdir(parents=True)
    vocab_size = open_shard(shard_paths(data)[0])[1]
    program = ROOT / "build" / "release" / "fresh_weights"
    if not program.is_file():
        raise SystemExit(f"{program}: not there; run make first")
    subprocess.run([program, model, str(vocab_size), str(seed), folder], check=True)
    return folder


def device_of(records):
    """'cpu' or 'cuda': where the run computed."""
    return next(r for r in records if r["kind"] == "run")["settings"]["device"]


def newest_checkpoint(out):
    return sorted(p for p in pathlib.Path(out).glob("step_*") if p.is_dir())[-1]


# ---- safetensors files and checkpoint folders


def read_fixture(path):
    """A fixture's tensors (numpy) and the configuration in its metadata."""
    import safetensors

    with safetensors.safe_open(path, framework="np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = file.metadata()
    of_the_case = ("B", "T", "mean_loss", "qk_norm_eps")
    return tensors, {key: _parse(value) for key, value in metadata.items() if key not in of_the_case}


def _parse(text):
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except json.JSONDecodeError:
        return text


def write_checkpoint(directory, config, tensors):
    """A folder that both programs load. config: the keys that differ from the official defaults."""
    import safetensors.numpy

    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    defaults = dict(
        architectures=["ForgettingTransformerForCausalLM"],
        model_type="forgetting_transformer-project_fox",
        torch_dtype="float32",
        fgate_type="full",
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    (directory / "config.json").write_text(json.dumps({**defaults, **config}, indent=2) + "\n")
    tensors = {name: np.ascontiguousarray(t, dtype=np.float32) for name, t in tensors.items()}
    safetensors.numpy.save_file(tensors, str(directory / "model.safetensors"), metadata={"format": "pt"})


def map_tensors(path):
    """{name: array} of a safetensors file of float32 numbers. What is written into an array is written into the file."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {
        name: np.memmap(path, dtype="<f4", mode="r+", offset=8 + size + t["data_offsets"][0], shape=tuple(t["shape"]))
        for name, t in header.items()
    }


def fixture_weights(tensors):
    return {name: t for name, t in tensors.items() if name.startswith("model.") or name == "lm_head.weight"}


# ---- the official model


class Official:
    """The imported code: .modeling (the module), .Config and .Model (its classes). tuned: its kernels choose the
    fastest of their block sizes, which takes a minute for each new shape; otherwise they take the first."""

    def __init__(self, directory, tuned=False):
        source = pathlib.Path(directory)
        source = source / "src" if (source / "src" / "forgetting_transformer").is_dir() else source
        if not (source / "forgetting_transformer").is_dir():
            raise SystemExit(
                f"--official {directory}: no src/forgetting_transformer there; expected a clone of "
                "github.com/zhixuan-lin/forgetting-transformer"
            )
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        sys.path.insert(0, str(source))
        import torch
        import transformers

        if not torch.cuda.is_available():
            raise SystemExit("the official model needs an NVIDIA GPU: its layers are Triton kernels")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        from forgetting_transformer.model.forgetting_transformer import modeling_forgetting_transformer as modeling

        self.torch, self.modeling = torch, modeling
        self.Config, self.Model = modeling.ForgettingTransformerConfig, modeling.ForgettingTransformerForCausalLM
        self.Model._tied_weights_keys = {}
        torch.backends.cuda.matmul.allow_tf32 = False
        if not tuned:
            self._take_first_configurations()

    @staticmethod
    def _take_first_configurations():
        for module in [m for name, m in sys.modules.items() if name.startswith("forgetting_transformer.")]:
            for kernel in list(vars(module).values()):
                while kernel is not None and type(kernel).__module__.startswith("triton."):
                    if hasattr(kernel, "configs"):
                        kernel.configs = kernel.configs[:1]
                    kernel = getattr(kernel, "fn", None)

    def config(self, source, acp=False):
        """From a checkpoint folder or a dictionary of keys."""
        config = self.Config(**source) if isinstance(source, dict) else self.Config.from_pretrained(str(source))
        for name, value in (("use_return_dict", True), ("output_attentions", False), ("output_hidden_states", False)):
            if not hasattr(config, name):
                setattr(config, name, value)
        config.log_pruning_tolerance = LOG_TOLERANCE if acp else None
        return config

    def load(self, checkpoint, acp=False):
        """The model of a checkpoint folder on the GPU, float32, in training mode. Every tensor must be there, and no
        other."""
        torch = self.torch
        model, info = self.Model.from_pretrained(str(checkpoint), config=self.config(checkpoint, acp), output_loading_info=True)
        for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            found = info.get(key) if isinstance(info, dict) else getattr(info, key)
            if found:
                raise SystemExit(f"{checkpoint}: from_pretrained reports {key}: {sorted(map(str, found))}")
        if any(p.dtype != torch.float32 for p in model.parameters()):
            raise SystemExit(f"{checkpoint}: from_pretrained did not give float32 weights")
        model = model.cuda().train()
        for module in model.modules():
            if hasattr(module, "_compute_inv_freq"):
                module.inv_freq = module._compute_inv_freq(device="cuda")
        return model

    def prune(self, model, acp):
        """Switches pruning in a model that is loaded: its layers keep the tolerance of the configuration, and look at it in every pass."""
        layers = [module for module in model.modules() if hasattr(module, "log_pruning_tolerance")]
        if not layers:
            raise SystemExit("--official: no layer has a log_pruning_tolerance; this version of the official code prunes otherwise")
        for part in (model.config, *layers):
            part.log_pruning_tolerance = LOG_TOLERANCE if acp else None

    @contextlib.contextmanager
    def precision(self, name):
        """'bf16': autocast and the official kernels. 'float32': no 16-bit number anywhere."""
        kernel = self.modeling.forgetting_attention
        try:
            if name == "bf16":
                with self.torch.autocast("cuda", self.torch.bfloat16):
                    yield
            else:
                self.modeling.forgetting_attention = self.attention_by_definition
                yield
        finally:
            self.modeling.forgetting_attention = kernel

    def attention_by_definition(self, q, k, v, log_fgate, *, head_first, sm_scale, adaptive_threshold=None):
        """softmax(q k^T sm_scale + c_i - c_j) v over j <= i, all of it: nothing is pruned. q, k, v: [B, H, T, D]."""
        torch, rows, T = self.torch, 512, q.shape[2]
        assert head_first
        c = log_fgate.double().cumsum(-1)

        def block(q_block, k_seen, v_seen, c_block, c_seen):
            first = c_seen.shape[-1] - c_block.shape[-1]
            scores = q_block @ k_seen.mT * sm_scale + (c_block[..., :, None] - c_seen[..., None, :]).float()
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(first + 1)
            return scores.masked_fill(future, float("-inf")).softmax(-1) @ v_seen

        out = []
        for i in range(0, T, rows):
            end = min(i + rows, T)
            out.append(
                torch.utils.checkpoint.checkpoint(
                    block, q[:, :, i:end], k[:, :, :end], v[:, :, :end], c[:, :, i:end], c[:, :, :end], use_reentrant=False
                )
            )
        return torch.cat(out, dim=2)

    def forward_backward(self, model, tokens, targets, precision):
        """tokens, targets: [B, T] integers. The loss of every token (float32, numpy) and the gradient of their mean:
        {name: float32 tensor on the GPU}."""
        torch = self.torch
        tokens, targets = (torch.as_tensor(np.asarray(x), dtype=torch.long, device="cuda") for x in (tokens, targets))
        model.zero_grad(set_to_none=True)
        with self.precision(precision):
            losses = model(input_ids=tokens, labels=targets, use_cache=False).loss
        losses.mean().backward()
        gradients = {name: p.grad.detach().float().clone() for name, p in model.named_parameters()}
        model.zero_grad(set_to_none=True)
        return losses.detach().float().cpu().numpy(), gradients

    def versions(self):
        import transformers
        import triton

        return dict(
            device=self.torch.cuda.get_device_name(0),
            torch=self.torch.__version__,
            triton=triton.__version__,
            transformers=transformers.__version__,
        )


def total_norm(gradients):
    """The global norm of a dictionary of gradients."""
    return float(sum(g.double().square().sum() for g in gradients.values()).sqrt())
