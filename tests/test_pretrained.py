"""diffusers' networks as ours and back: the same numbers, every tensor to the bit, and what does not fit is named."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxgen import diffusion, nets
from jaxgen.pretrained import load_diffusers_unet, save_diffusers_unet
from jaxgen.pretrained.shapes import parameters

WEIGHTS = "diffusion_pytorch_model.safetensors"

# The options in which google/ddpm-cifar10-32 differs from diffusers' defaults; at full size it is 35.7 M parameters.
CIFAR10 = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "attention_head_dim": None,
    "norm_eps": 1e-6,
}
SMALL = CIFAR10 | {"block_out_channels": (32, 64, 64, 64), "layers_per_block": 1}
TINY = CIFAR10 | {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
}
LABELLED = {
    "sample_size": 12,
    "in_channels": 2,
    "out_channels": 1,
    "block_out_channels": (16, 48),
    "layers_per_block": 2,
    "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
    "attention_head_dim": 8,
    "norm_num_groups": 8,
    "norm_eps": 1e-2,  # far from 1e-6, so that it is seen
    "num_class_embeds": 5,
    "dropout": 0.1,
}
SCALED = LABELLED | {
    "block_out_channels": (16, 32, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 8,
    "num_class_embeds": None,
    "act_fn": "swish",
    "sample_size": None,
}
MIDDLE = LABELLED | {
    "layers_per_block": 1,
    "down_block_types": 2 * ("DownBlock2D",),
    "up_block_types": 2 * ("UpBlock2D",),
}
NO_MIDDLE = LABELLED | {
    "layers_per_block": 1,
    "add_attention": False,
    "flip_sin_to_cos": False,
    "downsample_padding": 0,
}
ALL = {
    "ddpm-cifar10, narrow": SMALL,
    "labels and heads": LABELLED,
    "scale and shift": SCALED,
    "the middle does not": NO_MIDDLE,
}
MIDDLE_ONLY = pytest.param(MIDDLE, id="only the middle attends")
FULL = pytest.param(CIFAR10, id="ddpm-cifar10", marks=pytest.mark.slow)
CONFIGURATIONS = [*(pytest.param(config, id=name) for name, config in ALL.items()), FULL]


def theirs(config):
    """A network of diffusers with the given options, weights at random."""
    torch = pytest.importorskip("torch", reason="install the extra [peers] to compare with diffusers")
    diffusers = pytest.importorskip("diffusers", reason="install the extra [peers] to compare with diffusers")
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(**config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:  # neither scale nor bias may hide behind ones and zeros
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def called(network, x, t, labels=None):
    import torch

    with torch.no_grad():
        labels = None if labels is None else torch.tensor(labels)
        return network(torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(t), labels).sample.numpy()


def inputs(config, size):
    x = np.random.default_rng(0).normal(size=(2, size, size, config.get("in_channels", 3))).astype(np.float32)
    labels = () if config.get("num_class_embeds") is None else (np.array([config["num_class_embeds"] - 1, 1]),)
    return x, np.array([3, 871]), *labels


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


# diffusers' own warnings, not ours.
peer = pytest.mark.filterwarnings("default")


@peer
@pytest.mark.parametrize("config", CONFIGURATIONS)
def test_a_network_of_diffusers_computes_the_same_here(config, tmp_path):
    network = theirs(config)
    network.save_pretrained(tmp_path, safe_serialization=True)
    model, params = load_diffusers_unet(tmp_path)
    assert count(params) == sum(parameter.numel() for parameter in network.parameters())
    if config is CIFAR10:
        assert count(params) == 35_746_307
    arguments = inputs(config, 32 if config is CIFAR10 else 16)  # it is the levels that attend, whatever their height
    expected = called(network, *arguments).transpose(0, 2, 3, 1)
    ours = jax.jit(model.apply)(params, *arguments)
    print(f"max |difference| {np.abs(ours - expected).max():.2e} of {np.abs(expected).max():.2f}")
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


@peer
@pytest.mark.parametrize("config", [pytest.param(TINY, id="tiny"), FULL])
def test_twenty_steps_of_ddim_draw_the_same_image(config, tmp_path):
    network = theirs(config)
    import diffusers
    import torch

    with torch.no_grad():
        network.conv_out.weight.mul_(10)  # as large an output as the noise it stands for
    network.save_pretrained(tmp_path)
    model, params = load_diffusers_unet(tmp_path)
    size = 32 if config is CIFAR10 else 16
    start = np.random.default_rng(1).normal(size=(1, size, size, 3))
    scheduler = diffusers.DDIMScheduler(1000, 1e-4, 0.02, "linear", clip_sample=True, timestep_spacing="trailing")
    scheduler.set_timesteps(20)
    x = torch.tensor(start.transpose(0, 3, 1, 2), dtype=torch.float32)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t).sample, t, x, use_clipped_model_output=True).prev_sample
    expected = x.numpy().transpose(0, 2, 3, 1)

    path = diffusion.linear_beta()
    denoise = diffusion.denoiser(path, diffusion.noise, lambda x, t: model.apply(params, x, t - 1))
    clipped = diffusion.clip_data(denoise, -1.0, 1.0)
    table = diffusion.ddim(path, diffusion.uniform_times(path, 20))
    ours = jax.jit(lambda x: diffusion.sample(jax.random.key(0), clipped, table, x))(jnp.float32(start))
    print(f"max |difference| {np.abs(ours - expected).max():.2e} of {np.abs(expected).max():.2f}")
    assert expected.std() > 0.5
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-3)


@peer
@pytest.mark.parametrize("config", [*CONFIGURATIONS, MIDDLE_ONLY])
def test_what_is_loaded_and_saved_is_diffusers_to_the_bit(config, tmp_path):
    network = theirs(config)
    network.save_pretrained(tmp_path / "theirs")
    model, params = load_diffusers_unet(tmp_path / "theirs")
    save_diffusers_unet(tmp_path / "ours", model, params, sample_size=config["sample_size"])
    before, after = (load_file(tmp_path / side / WEIGHTS) for side in ("theirs", "ours"))
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array, err_msg=name, strict=True)
    again = type(network).from_pretrained(tmp_path / "ours").eval()
    np.testing.assert_array_equal(called(again, *inputs(config, 16)), called(network, *inputs(config, 16)))
    for option, value in network.config.items():
        if option != "act_fn" and not option.startswith("_"):  # swish is called silu
            came = again.config[option]
            assert (tuple(came) if isinstance(came, list) else came) == value, option


@peer
def test_a_network_of_ours_computes_the_same_in_diffusers(tmp_path):
    """Attention by height, heads by number, labels: all is said in their words."""
    diffusers = pytest.importorskip("diffusers", reason="install the extra [peers] to compare with diffusers")
    model, params, arguments = own(heads=2, multipliers=(1, 2, 1), attention=(8, 2), num_classes=3)
    save_diffusers_unet(tmp_path / "ours", model, params)
    network = diffusers.UNet2DModel.from_pretrained(tmp_path / "ours").eval()
    assert network.config.attention_head_dim == 8
    expected = called(network, *(np.asarray(a) for a in arguments)).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(jax.jit(model.apply)(params, *arguments), expected, rtol=0, atol=1e-4)


def own(**fields):
    """A network of ours, its random parameters and a call's arguments."""
    fields = {"channels": 16, "multipliers": (1, 2), "blocks": 1, "attention": (4,), "groups": 8, **fields}
    model = nets.UNet(out_channels=2, zero_init=False, **fields)
    labels = () if model.num_classes is None else (jnp.array([0, model.num_classes]),)
    arguments = (jax.random.normal(jax.random.key(1), (2, 8, 8, 3)), jnp.array([5, 600]), *labels)
    numbers = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *arguments)
    return model, jax.tree.map(lambda leaf: jnp.float32(numbers.normal(size=leaf.shape) / 8), shapes), arguments


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pretrained") / "unet"
    save_diffusers_unet(directory, *own()[:2])
    return directory


@pytest.fixture
def directory(undamaged, tmp_path):
    """A directory with a network in it, for tests to damage."""
    return shutil.copytree(undamaged, tmp_path / "unet")


def edit_config(directory, **options):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | options))


def edit_weights(directory, **changed):
    arrays = load_file(directory / WEIGHTS) | changed
    save_file({name: array for name, array in arrays.items() if array is not None}, directory / WEIGHTS)


def shard(directory, *, first="a.safetensors"):
    arrays = sorted(load_file(directory / WEIGHTS).items())
    (directory / WEIGHTS).unlink()
    save_file(dict(arrays[:9]), directory / "a.safetensors")
    save_file(dict(arrays[9:]), directory / "b.safetensors")
    names = {name: first if i < 9 else "b.safetensors" for i, (name, _) in enumerate(arrays)}
    (directory / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, {"attention_levels": (1,), "middle_attention": True}),
        ({"scale_shift": True, "num_classes": 3, "attention": ()}, {"attention_levels": (), "middle_attention": False}),
        ({"attention_levels": (1, 0), "head_dim": 8, "middle_attention": False}, {"attention_levels": (0, 1)}),
        ({"heads": 4}, {"attention_levels": (1,), "middle_attention": True, "heads": 1, "head_dim": 8}),
        ({"attention_levels": (), "middle_attention": True, "downsample_padding": (1, 1), "dropout": 0.2}, {}),
        (
            {"attention_levels": (0,), "eps": 1e-5, "freq_shift": 0.5, "flip_sin_to_cos": True},
            {"middle_attention": True},
        ),
    ],
)
def test_saved_and_loaded_is_the_same_network(fields, said, tmp_path):
    model, params, _ = own(**fields)
    save_diffusers_unet(tmp_path / "deep" / "unet", model, params)
    again, loaded = load_diffusers_unet(tmp_path / "deep" / "unet")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), loaded, params)
    assert again == model.clone(attention=(), zero_init=True, **said)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["unet"]
    assert {path.name for path in (tmp_path / "deep" / "unet").iterdir()} == {"config.json", WEIGHTS}


@pytest.mark.parametrize(
    "fields",
    [
        {"attention_levels": (1,), "num_classes": 3, "in_channels": 1},
        {"attention_levels": (0, 2), "multipliers": (1, 2, 2), "blocks": 2, "middle_attention": False},
        {"attention_levels": (), "middle_attention": True, "scale_shift": True, "multipliers": (2, 1, 3)},
        {"attention_levels": (), "blocks": 3, "multipliers": (1,)},
    ],
)
def test_shapes_are_those_of_the_network_itself(fields):
    channels = fields.pop("in_channels", 3)
    network = nets.UNet(out_channels=2, channels=16, groups=8, **{"blocks": 1, "multipliers": (1, 2), **fields})
    labels = None if network.num_classes is None else jnp.zeros(1, jnp.int32)
    expected = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 4, 4, channels)), jnp.zeros(1), labels)
    assert parameters(network, channels) == expected


def test_a_configuration_may_leave_defaults_out(tmp_path):
    """Files of older versions lack the options that came later."""
    model, params, _ = own(eps=1e-5, freq_shift=0, flip_sin_to_cos=True, downsample_padding=(1, 1), head_dim=8)
    save_diffusers_unet(tmp_path / "unet", model, params)
    config = json.loads((tmp_path / "unet" / "config.json").read_text())
    kept = ("_class_name", "out_channels", "block_out_channels", "down_block_types", "up_block_types")
    short = {option: config[option] for option in (*kept, "layers_per_block", "norm_num_groups")}
    (tmp_path / "unet" / "config.json").write_text(json.dumps(short | {"_diffusers_version": "0.0.4"}))
    again, _ = load_diffusers_unet(tmp_path / "unet")
    assert again == model.clone(attention=(), attention_levels=(1,), middle_attention=True, zero_init=True)


def test_shards_former_names_and_half_precision_are_read(directory):
    _, expected = load_diffusers_unet(directory)
    halved = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), expected)
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    arrays = {}
    for name, array in load_file(directory / WEIGHTS).items():
        for now, then in former.items():
            name = name.replace(f".{now}.", f".{then}.")
        arrays[name] = array.astype(jnp.bfloat16)
    assert sum("proj_attn" in name for name in arrays) == 8
    save_file(arrays, directory / WEIGHTS)
    shard(directory)
    _, params = load_diffusers_unet(directory)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), params, halved)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("center_input_sample", True, "False"),
        ("time_embedding_type", "fourier", "'positional'"),
        ("time_embedding_dim", 32, "64"),
        ("down_block_types", ["DownBlock2D", "SkipDownBlock2D"], "a list of DownBlock2D and AttnDownBlock2D"),
        ("down_block_types", ["DownBlock2D"], "2 blocks, one per level"),
        ("up_block_types", ["UpBlock2D", "UpBlock2D"], "the mirror image of the others"),
        ("mid_block_type", None, "'UNetMidBlock2D'"),
        ("block_out_channels", [16, 24], "a list of multiples of its first entry"),
        ("block_out_channels", [], "a list of multiples of its first entry"),
        ("block_out_channels", 16, "a list of multiples of its first entry"),
        ("layers_per_block", 0, "an integer of at least 1"),
        ("layers_per_block", True, "an integer of at least 1"),
        ("mid_block_scale_factor", 2, "1"),
        ("downsample_padding", 2, "1 or 0"),
        ("downsample_type", "resnet", "'conv'"),
        ("upsample_type", "resnet", "'conv'"),
        ("dropout", 1, r"a number in \[0, 1\)"),
        ("act_fn", "gelu", "'silu' or 'swish'"),
        ("attention_head_dim", 5, r"None or a divisor of the channels that attend, \[32, 32\]"),
        ("attention_head_dim", "8", "None or an integer of at least 1"),
        ("norm_num_groups", None, "an integer of at least 1"),
        ("norm_num_groups", 32, r"a divisor of all of \[16, 32\]"),
        ("attn_norm_num_groups", 4, "`norm_num_groups`, 8"),
        ("resnet_time_scale_shift", "scale_shift", "`norm_num_groups`, 8"),  # then None is no normalisation
        ("resnet_time_scale_shift", "spatial", "'default' or 'scale_shift'"),
        ("norm_eps", math.nan, "a number of at least 0"),
        ("class_embed_type", "timestep", "None"),
        ("num_class_embeds", 1, "None or an integer of at least 2"),
    ],
)
def test_options_that_do_not_fit_are_named(option, value, expected, directory):
    edit_config(directory, **{option: value})
    named = "attn_norm_num_groups" if value == "scale_shift" else option
    with pytest.raises(ValueError, match=f"`{named}` in config.json must be {expected}"):
        load_diffusers_unet(directory)


@pytest.mark.parametrize(
    ("error", "message", "damage"),
    [
        (ValueError, "`_class_name` must be 'UNet2DModel', got 'AutoencoderKL'", lambda d: edit_config(d, _class_name="AutoencoderKL")),
        (ValueError, "`_class_name` must be 'UNet2DModel', got None", lambda d: (d / "config.json").write_text("{}")),
        (ValueError, "must hold options of UNet2DModel only, got cross_attention_dim", lambda d: edit_config(d, cross_attention_dim=8)),
        (ValueError, "config.json must be JSON", lambda d: (d / "config.json").write_text("{")),
        (ValueError, "config.json must be a JSON object, got list", lambda d: (d / "config.json").write_text("[]")),
        (FileNotFoundError, "config.json", lambda d: (d / "config.json").unlink()),
        (FileNotFoundError, "must hold either diffusion_pytorch_model.safetensors or .* got neither", lambda d: (d / WEIGHTS).unlink()),
        (FileNotFoundError, "got diffusion_pytorch_model.bin; a pickle is not opened", lambda d: (d / WEIGHTS).rename(d / "diffusion_pytorch_model.bin")),
        (ValueError, "got both", lambda d: (d / f"{WEIGHTS}.index.json").write_text("{}")),
        (ValueError, "these are missing: conv_in.bias", lambda d: edit_weights(d, **{"conv_in.bias": None})),
        (ValueError, "it has no class_embedding.weight$", lambda d: edit_weights(d, **{"class_embedding.weight": np.zeros((2, 64), np.float32)})),
        (ValueError, r"conv_in.weight of shape \[16, 3, 3, 3\], got \[3, 3, 3, 16\]", lambda d: edit_weights(d, **{"conv_in.weight": np.zeros((3, 3, 3, 16), np.float32)})),
        (ValueError, r"conv_in.weight of shape \[16, 4, 3, 3\], got \[16, 3, 3, 3\]", lambda d: edit_config(d, in_channels=4)),
        (ValueError, r"missing: down_blocks.0.attentions.0.group_norm.bias, .* and 25 more", lambda d: edit_config(d, down_block_types=2 * ["AttnDownBlock2D"], up_block_types=2 * ["AttnUpBlock2D"])),
        (ValueError, "must be float32, float16 or bfloat16, got F64 for conv_in.bias", lambda d: edit_weights(d, **{"conv_in.bias": np.zeros(16)})),
        (ValueError, "two of mid_block.attentions.0.to_q.bias", lambda d: edit_weights(d, **{"mid_block.attentions.0.query.bias": np.zeros(32, np.float32)})),
        (ValueError, "must be a whole safetensors file", lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:100])),
        (ValueError, "must be a whole safetensors file", lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:-1])),
        (ValueError, "must be a whole safetensors file", lambda d: (d / WEIGHTS).write_bytes(b"\x80\x04K*." * 9)),
        (ValueError, "must be a whole safetensors file", lambda d: (d / WEIGHTS).write_bytes(b"")),
        (ValueError, "must name files of its directory, .* got '../a.safetensors'", lambda d: shard(d, first="../a.safetensors")),
        (ValueError, "must name files of its directory, .* got '/etc/a.safetensors'", lambda d: shard(d, first="/etc/a.safetensors")),
        (ValueError, "must name files of its directory, .* got 'a.bin'", lambda d: shard(d, first="a.bin")),
        (ValueError, "must name files of its directory, .* got 7", lambda d: shard(d, first=7)),
        (FileNotFoundError, "c.safetensors", lambda d: shard(d, first="c.safetensors")),
        (ValueError, "must hold an object `weight_map`, got NoneType", lambda d: [shard(d), (d / f"{WEIGHTS}.index.json").write_text("{}")]),
        (ValueError, "these are missing: conv_in.bias", lambda d: [edit_weights(d, **{"conv_in.bias": None}), shard(d)]),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_named(error, message, damage, directory):
    damage(directory)
    with pytest.raises(error, match=message):
        load_diffusers_unet(directory)


def without(params, module):
    return {"params": {name: tree for name, tree in params["params"].items() if name != module}}


@pytest.mark.parametrize(
    ("message", "fields", "change"),
    [
        (r"`network.time_scale` must be 1.0 in a UNet2DModel, got 1000.0", {"time_scale": 1000.0}, None),
        (r"`network.channels` must be 32 in a UNet2DModel, got 16", {"multipliers": (2, 4)}, None),
        (r"`network.heads` must be 1 where \[16, 32, 32\] channels attend, got 2", {"heads": 2, "attention": (8, 4)}, None),
        ("these are missing: params/conv_in/bias, params/conv_in/kernel", {}, lambda p: without(p, "conv_in")),
        ("these are missing: params/conv_in/bias,", {}, lambda p: p["params"]),
        ("it has no params/more$", {}, lambda p: {"params": p["params"] | {"more": jnp.zeros(1)}}),
        ("it has no batch_stats/mean", {}, lambda p: p | {"batch_stats": {"mean": jnp.zeros(1)}}),
        (r"params/norm_out/scale of shape \[16\], got \[1\]", {}, lambda p: {"params": p["params"] | {"norm_out": {"scale": jnp.ones(1), "bias": jnp.ones(16)}}}),
        (r"params/time_0/kernel of shape \[16, 64\], got \[32, 64\]", {}, lambda p: {"params": p["params"] | {"time_0": {"kernel": jnp.zeros((32, 64)), "bias": jnp.zeros(64)}}}),  # of two times
        ("must be float32, got bfloat16 for params/conv_in/bias", {}, lambda p: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), p)),
    ],
)  # fmt: skip
def test_networks_that_diffusers_cannot_express_are_named(message, fields, change, tmp_path):
    model, params, _ = own(**fields)
    with pytest.raises(ValueError, match=message):
        save_diffusers_unet(tmp_path / "unet", model, params if change is None else change(params))
    assert not list(tmp_path.iterdir())


def test_saving_is_whole_or_nothing(directory, monkeypatch):
    model, params, _ = own()
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(FileExistsError, match="`directory` must not exist yet or be empty"):
        save_diffusers_unet(directory, model, params)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    with pytest.raises(ValueError, match="`sample_size` must be an integer of at least 1, got 0"):
        save_diffusers_unet(directory.parent / "other", model, params, sample_size=0)

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("jaxgen.pretrained.unet.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        save_diffusers_unet(directory.parent / "other", model, params)
    assert [path.name for path in directory.parent.iterdir()] == ["unet"]
