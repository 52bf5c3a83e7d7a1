"""pytorch-fid's file with random weights: as the network in PyTorch, every tensor read, what does not fit is named."""

import hashlib
import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxgen.nets import Inception
from jaxgen.pretrained import inception, load_inception

FEATURES = (64, 192, 768, 2048)


# --- torchvision's Inception3 with pytorch-fid's changes: shapes of its kernels, [out, in, height, width]


def kernels():
    """By name, in the order of the network."""
    yield from {
        "Conv2d_1a_3x3": (32, 3, 3, 3),
        "Conv2d_2a_3x3": (32, 32, 3, 3),
        "Conv2d_2b_3x3": (64, 32, 3, 3),
        "Conv2d_3b_1x1": (80, 64, 1, 1),
        "Conv2d_4a_3x3": (192, 80, 3, 3),
    }.items()
    for block, c, pool in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
        yield from named(block, branch1x1=(64, c, 1, 1), branch_pool=(pool, c, 1, 1))
        yield from named(block, branch5x5_1=(48, c, 1, 1), branch5x5_2=(64, 48, 5, 5))
        yield from named(
            block, branch3x3dbl_1=(64, c, 1, 1), branch3x3dbl_2=(96, 64, 3, 3), branch3x3dbl_3=(96, 96, 3, 3)
        )
    yield from named("6a", branch3x3=(384, 288, 3, 3))
    yield from named("6a", branch3x3dbl_1=(64, 288, 1, 1), branch3x3dbl_2=(96, 64, 3, 3), branch3x3dbl_3=(96, 96, 3, 3))
    for block, w in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        yield from named(block, branch1x1=(192, 768, 1, 1), branch_pool=(192, 768, 1, 1))
        yield from named(block, branch7x7_1=(w, 768, 1, 1), branch7x7_2=(w, w, 1, 7), branch7x7_3=(192, w, 7, 1))
        yield from named(block, branch7x7dbl_1=(w, 768, 1, 1), branch7x7dbl_2=(w, w, 7, 1), branch7x7dbl_3=(w, w, 1, 7))
        yield from named(block, branch7x7dbl_4=(w, w, 7, 1), branch7x7dbl_5=(192, w, 1, 7))
    yield from named("7a", branch3x3_1=(192, 768, 1, 1), branch3x3_2=(320, 192, 3, 3), branch7x7x3_1=(192, 768, 1, 1))
    yield from named(
        "7a", branch7x7x3_2=(192, 192, 1, 7), branch7x7x3_3=(192, 192, 7, 1), branch7x7x3_4=(192, 192, 3, 3)
    )
    for block, c in (("7b", 1280), ("7c", 2048)):
        yield from named(block, branch1x1=(320, c, 1, 1), branch_pool=(192, c, 1, 1), branch3x3_1=(384, c, 1, 1))
        yield from named(block, branch3x3_2a=(384, 384, 1, 3), branch3x3_2b=(384, 384, 3, 1))
        yield from named(block, branch3x3dbl_1=(448, c, 1, 1), branch3x3dbl_2=(384, 448, 3, 3))
        yield from named(block, branch3x3dbl_3a=(384, 384, 1, 3), branch3x3dbl_3b=(384, 384, 3, 1))


def named(block, **branches):
    return [(f"Mixed_{block}.{branch}", shape) for branch, shape in branches.items()]


def random_weights():
    """Of a network whose activations neither vanish nor explode, nor hide a bias, a mean or an eps."""
    rng = np.random.default_rng(0)
    weights = {"fc.weight": rng.normal(size=(1008, 2048)) / 16, "fc.bias": rng.normal(size=1008)}
    for name, shape in kernels():
        weights[f"{name}.conv.weight"] = rng.normal(size=shape, scale=np.sqrt(2 / np.prod(shape[1:])))
        weights[f"{name}.bn.weight"] = rng.uniform(0.08, 0.12, shape[0])
        weights[f"{name}.bn.bias"] = rng.normal(size=shape[0], scale=0.1)
        weights[f"{name}.bn.running_mean"] = rng.normal(size=shape[0], scale=0.1)
        weights[f"{name}.bn.running_var"] = rng.uniform(0.005, 0.015, shape[0])
        weights[f"{name}.bn.num_batches_tracked"] = np.zeros((), np.int64)
    return {name: array.astype(np.float32) if array.ndim else array for name, array in weights.items()}


class Theirs:
    """The network in PyTorch."""

    def __init__(self, torch, weights):
        self.functional, self.cat = torch.nn.functional, torch.cat
        self.weights = {name: torch.from_numpy(array) for name, array in weights.items()}

    def __call__(self, x):
        """The four means and the logits with and without bias, by width."""
        h = self.layer(self.layer(self.layer(x, "Conv2d_1a_3x3", 2, 0), "Conv2d_2a_3x3", 1, 0), "Conv2d_2b_3x3")
        taps = [h := self.functional.max_pool2d(h, 3, 2)]
        h = self.layer(self.layer(h, "Conv2d_3b_1x1"), "Conv2d_4a_3x3", 1, 0)
        taps.append(h := self.functional.max_pool2d(h, 3, 2))
        for block in ("5b", "5c", "5d"):
            h = self.joined(
                h, block, "branch1x1", "branch5x5_1 branch5x5_2", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3"
            )
        h = self.reduced(h, "6a", "branch3x3*", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3*")
        for block in ("6b", "6c", "6d", "6e"):
            sevens = "branch7x7_1 branch7x7_2 branch7x7_3", " ".join(f"branch7x7dbl_{i}" for i in range(1, 6))
            h = self.joined(h, block, "branch1x1", *sevens)
        taps.append(h)
        h = self.reduced(
            h, "7a", "branch3x3_1 branch3x3_2*", "branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4*"
        )
        for block in ("7b", "7c"):
            small = [f"branch3x3_1 branch3x3_2{side}" for side in "ab"]
            large = [f"branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3{side}" for side in "ab"]
            h = self.joined(h, block, "branch1x1", *small, *large, maximum=block == "7c")
        taps.append(h)
        means = [tap.mean((2, 3)) for tap in taps]
        unbiased = means[-1] @ self.weights["fc.weight"].T
        return *means, unbiased, unbiased + self.weights["fc.bias"]

    def layer(self, h, name, stride=1, padding=None):
        kernel = self.weights[f"{name}.conv.weight"]
        padding = tuple(n // 2 for n in kernel.shape[2:]) if padding is None else padding
        scale, bias, mean, var = (
            self.weights[f"{name}.bn.{n}"] for n in ("weight", "bias", "running_mean", "running_var")
        )
        h = self.functional.conv2d(h, kernel, stride=stride, padding=padding)
        return self.functional.batch_norm(h, mean, var, scale, bias, eps=1e-3).relu()

    def path(self, h, block, names):
        for name in names.split():
            reduces = (2, 0) if name.endswith("*") else ()
            h = self.layer(h, f"Mixed_{block}.{name.removesuffix('*')}", *reduces)
        return h

    def joined(self, h, block, *paths, maximum=False):
        if maximum:
            pooled = self.functional.max_pool2d(h, 3, 1, 1)
        else:
            pooled = self.functional.avg_pool2d(h, 3, 1, 1, count_include_pad=False)
        return self.cat([*(self.path(h, block, names) for names in paths), self.path(pooled, block, "branch_pool")], 1)

    def reduced(self, h, block, *paths):
        return self.cat([*(self.path(h, block, names) for names in paths), self.functional.max_pool2d(h, 3, 2)], 1)


@pytest.fixture(scope="module")
def weights():
    return random_weights()


@pytest.fixture(scope="module")
def path(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    save_file(weights, path)
    return path


@pytest.fixture(scope="module")
def params(path):
    return load_inception(path)


@jax.jit
def ours(params, x):
    features = [Inception(features=n).apply(params, x) for n in FEATURES]
    logits = [Inception().apply(params, features[-1], bias=bias, method="logits") for bias in (False, True)]
    return *features, *logits


@pytest.mark.parametrize(
    ("height", "width"), [(107, 139), pytest.param(299, 299, id="published size", marks=pytest.mark.slow)]
)
def test_it_computes_what_it_computes_in_pytorch(height, width, weights, params):
    """Of the last maps, 2 x 3 pixels, no two neighbourhoods are alike, nor is height width."""
    torch = pytest.importorskip("torch", reason="install the extra [peers] to compare with PyTorch")
    x = np.random.default_rng(1).uniform(-1, 1, (2, height, width, 3)).astype(np.float32)
    x[1] /= 2  # noise looks alike from afar
    with torch.no_grad():
        expected = Theirs(torch, weights)(torch.from_numpy(x.transpose(0, 3, 1, 2)))
    for came, wanted in zip(ours(params, x), expected, strict=True):
        wanted = wanted.numpy()
        assert wanted.std() > 0.03
        assert np.abs(wanted[0] - wanted[1]).max() > 0.03
        print(f"{wanted.shape[1]}: max |difference| {np.abs(came - wanted).max():.1e} of {np.abs(wanted).max():.2f}")
        np.testing.assert_allclose(came, wanted, rtol=1e-4, atol=1e-5)


def test_every_tensor_is_read(weights, params):
    """Sums of squares tell random tensors apart, whatever the order of their axes."""
    assert params.keys() == {"params", "batch_stats"}
    leaves = jax.tree.leaves(params)
    assert {leaf.dtype.name for leaf in leaves} == {"float32"}
    read = sorted(float(np.sum(np.square(leaf, dtype=float))) for leaf in leaves)
    stored = sorted(float(np.sum(np.square(array, dtype=float))) for array in weights.values() if array.ndim)
    assert len(weights) == 566  # as in the published file
    np.testing.assert_allclose(read, stored, rtol=1e-12)
    kernel = params["params"]["Mixed_6b"]["branch7x7_2"]["conv"]["kernel"]
    np.testing.assert_array_equal(kernel[0, 5, 3, 2], weights["Mixed_6b.branch7x7_2.conv.weight"][2, 3, 0, 5])
    np.testing.assert_array_equal(params["params"]["fc"]["kernel"].T, weights["fc.weight"])
    var = params["batch_stats"]["Conv2d_1a_3x3"]["bn"]["var"]
    np.testing.assert_array_equal(var, weights["Conv2d_1a_3x3.bn.running_var"])


@pytest.mark.parametrize("zipped", [True, False])
def test_the_file_of_pytorch(zipped, weights, params, tmp_path, monkeypatch):
    """In both of its formats; only the file of the published digest is opened."""
    torch = pytest.importorskip("torch", reason="install the extra [peers] to read files of PyTorch")
    path = tmp_path / "pt_inception.pth"
    state = {name: torch.from_numpy(array) for name, array in weights.items()}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"must have the SHA-256 of pytorch-fid's file, 6726825d.{56}, got .{64}$"):
        load_inception(path)
    monkeypatch.setattr(inception, "_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), load_inception(path), params)


class Payload:
    def __reduce__(self):
        return exec, ("import jaxgen; jaxgen.payload_ran = True",)


def test_a_pickle_runs_no_code(tmp_path, monkeypatch):
    """Not even one of the right digest."""
    torch = pytest.importorskip("torch", reason="install the extra [peers] to read files of PyTorch")
    import jaxgen

    path = tmp_path / "pt_inception.pth"
    torch.save({"fc.bias": Payload()}, path)
    monkeypatch.setattr(inception, "_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        load_inception(path)
    assert not hasattr(jaxgen, "payload_ran")


def test_pytorch_is_named_where_it_is_missing(tmp_path, monkeypatch):
    path = tmp_path / "pt_inception.pth"
    path.write_bytes(b"")
    monkeypatch.setattr(inception, "_SHA256", hashlib.sha256(b"").hexdigest())
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="needs PyTorch: `pip install torch`, or convert it to safetensors"):
        load_inception(path)


BIAS = "Mixed_7c.branch3x3_2b.bn.bias"


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        (f"these are missing: {BIAS}$", {BIAS: None}),
        ("these are missing: fc.bias, fc.weight$", {"fc.weight": None, "fc.bias": None}),
        ("it has no AuxLogits.fc.bias$", {"AuxLogits.fc.bias": np.zeros(1008, np.float32)}),
        ("it has no Conv2d_9.bn.num_batches_tracked$", {"Conv2d_9.bn.num_batches_tracked": np.zeros((), np.int64)}),
        (r"fc.weight of shape \[1008, 2048\], got \[1000, 2048\]", {"fc.weight": np.zeros((1000, 2048), np.float32)}),
        (f"must be float32, got float16 for {BIAS}", {BIAS: np.zeros(384, np.float16)}),
        (f"must be float32, got bfloat16 for {BIAS}", {BIAS: np.zeros(384, jnp.bfloat16)}),
    ],
)
def test_tensors_that_do_not_fit_are_named(message, changed, weights, tmp_path):
    changed = {name: array for name, array in (weights | changed).items() if array is not None}
    save_file(changed, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=message):
        load_inception(tmp_path / "other.safetensors")


def test_counters_may_be_absent(weights, params, tmp_path):
    without = {name: array for name, array in weights.items() if not name.endswith("tracked")}
    assert len(without) == len(weights) - 94
    save_file(without, tmp_path / "other.safetensors")
    again = load_inception(str(tmp_path / "other.safetensors"))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), again, params)


def test_files_that_do_not_fit_are_named(path, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="must be a whole safetensors file"):
        load_inception(tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match=r"`path` must end in .pth or .safetensors, got .*inception.pkl"):
        load_inception(tmp_path / "inception.pkl")
    for suffix in (".pth", ".safetensors"):
        with pytest.raises(FileNotFoundError):
            load_inception(tmp_path / f"absent{suffix}")
