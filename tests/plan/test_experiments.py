"""What experiments run, compiled for TPUs: reduced in the quick tests, as published in the slow ones."""

import dataclasses
import functools
import json

import pytest

from experiments import (
    cifar10_diffusion,
    cifar10_gan,
    cifar10_robust,
    cifar10_simclr,
    digits_contrastive,
    digits_diffusion,
    digits_gan,
    digits_meanflow,
    digits_robust,
    image_contrastive,
    image_diffusion,
    image_flow,
    image_gan,
    image_meanflow,
    image_robust,
    image_run,
    imagenet_dit,
    learned_solver,
    mnist_diffusion,
    planned,
    toy2d,
)
from jaxgen import place, plan

pytestmark = pytest.mark.usefixtures("libtpu")


def of(recipe):
    return functools.partial(image_run.programs, recipe), recipe.smoke


# Each one's settings, what it compiles, and what makes it small.
EXPERIMENTS = {
    "digits_diffusion": (digits_diffusion.CONFIG, *of(image_diffusion)),
    "digits_meanflow": (digits_meanflow.CONFIG, *of(image_meanflow)),
    "digits_gan": (digits_gan.CONFIG, *of(image_gan)),
    "digits_contrastive": (digits_contrastive.CONFIG, image_contrastive.programs, image_contrastive.smoke),
    "digits_robust": (digits_robust.CONFIG, image_robust.programs, image_robust.smoke),
    "mnist_diffusion": (mnist_diffusion.CONFIG, *of(image_diffusion)),
    "cifar10_diffusion": (cifar10_diffusion.CONFIG, *of(image_diffusion)),
    "cifar10_gan": (cifar10_gan.CONFIG, *of(image_gan)),
    "cifar10_simclr": (cifar10_simclr.CONFIG, image_contrastive.programs, image_contrastive.smoke),
    "cifar10_robust": (cifar10_robust.CONFIG, image_robust.programs, image_robust.smoke),
    "imagenet_dit": (imagenet_dit.CONFIG, *of(image_flow)),
    "toy2d": (toy2d.Config(), toy2d.programs, lambda config: toy2d.SMOKE),
    "learned_solver": (learned_solver.Config(), learned_solver.programs, lambda config: learned_solver.SMOKE),
}
TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
# What a user waits for is quick; the rest is the same with other numbers.
QUICK = {
    ("digits_diffusion", "v5e:2x2"),
    ("digits_contrastive", "v5p:2x2x1"),
    ("digits_gan", "v6e:2x2"),
    ("digits_robust", "v5e:2x2"),
    ("imagenet_dit", "v6e:2x2"),
    ("toy2d", "v5p:2x2x1"),
}


def reduced(name):
    config, programs, smoke = EXPERIMENTS[name]
    config = smoke(config)
    if name == "imagenet_dit":
        config = dataclasses.replace(config, fsdp=1, image_size=32)
    return config, programs


@pytest.mark.parametrize(
    ("name", "topology"),
    [
        pytest.param(name, topology, marks=() if (name, topology) in QUICK else pytest.mark.slow)
        for topology in TOPOLOGIES
        for name in EXPERIMENTS
    ],
)
def test_reduced(name, topology):
    """Split by data alone: gradients are reduced, activations stay where they are, the state is updated in place."""
    config, programs = reduced(name)
    where = plan.topology(topology)
    for part, compiled in programs(config, place.mesh(where.devices), "quick").items():
        program = compiled()
        assert program.fits, part
        reading = program.reading
        kinds = {each.kind: each for each in reading.collectives}
        assert (reading.transfers, reading.float64, reading.dynamic) == ((), 0, 0), part
        assert program.peak < where.chip.hbm
        if not part.startswith("training"):
            assert not kinds, part
            continue
        # Gradients of what computes in bfloat16 are reduced in it.
        assert program.gradients / (2 if getattr(config, "bfloat16", False) else 1) <= kinds["all-reduce"].bytes, part
        # Padding to tiles makes small leaves large.
        assert program.state <= program.aliased <= program.arguments
        if "contrastive" not in name and "simclr" not in name:  # which compare all images of a batch
            assert set(kinds) == {"all-reduce"}, part
            assert kinds["all-reduce"].bytes < 1.5 * program.gradients + 2**16, part


@pytest.mark.parametrize("topology", ["v5e:1x1", "v5e:2x2*2"])
def test_one_chip_and_two_slices(topology):
    config, programs = reduced("toy2d")
    where = plan.topology(topology)
    program = programs(config, place.mesh(where.devices), "quick")["training step"]()
    assert program.fits
    assert program.devices == len(where.devices)
    assert program.reading.transfers == ()
    if where.slices == 2:
        kinds = {each.kind: each for each in program.reading.collectives}
        assert set(kinds) == {"all-reduce", plan.hlo.BETWEEN_SLICES}
        assert plan.roofline(program, where).interconnect is None
    else:
        assert program.reading.collectives == ()
        assert plan.roofline(program, where).interconnect == 0


def test_the_command_line_says_what_it_found_and_keeps_it(tmp_path, capsys):
    file = tmp_path / "plan.json"
    command = planned.command("toy2d", toy2d.programs, toy2d.Config(), toy2d.SMOKE)
    command.run(dataclasses.replace(command.smoke, topology="v5e:2x2", json=str(file), batch_size=64, explain=True))
    said = capsys.readouterr().out
    assert "toy2d on v5e:2x2: 4 chip(s) of 16.0 GiB" in said
    assert "\nthe state of training step:\nparams/Dense_0/kernel: 4 x float32[34, 16], 8,704 bytes per device: " in said
    found = json.loads(file.read_text())
    assert found["programs"]["training step"]["rows"] == 64
    assert set(found["programs"]) == {"training step", "sampler"}


def test_what_does_not_fit_says_what_helps(capsys):
    """A state of 16 GB on one chip of 16 GB: no crash, and the way out."""
    config = dataclasses.replace(toy2d.SMOKE, width=24_000)
    command = planned.command("toy2d", toy2d.programs, config, config)
    command.run(dataclasses.replace(command.smoke, topology="v5e:2x2"))
    said = capsys.readouterr().out
    assert "NO" in said
    assert "training step does not fit: it needs " in said


DIT_XL = dataclasses.replace(
    imagenet_dit.CONFIG,
    image_size=32,  # of latents, as DiT-XL/2 has for pictures of 256 pixels
    batch_size=256,
    fsdp=1,
    dit=dataclasses.replace(imagenet_dit.CONFIG.dit, patch=2, features=1152, depth=28, heads=16),
)
PUBLISHED = {
    "cifar10_diffusion": EXPERIMENTS["cifar10_diffusion"][:2],
    "DiT-XL/2": (DIT_XL, EXPERIMENTS["imagenet_dit"][1]),
    "cifar10_robust": EXPERIMENTS["cifar10_robust"][:2],
    "cifar10_simclr": EXPERIMENTS["cifar10_simclr"][:2],
}


@pytest.fixture(scope="module")
def rows():
    """What was found of each program, printed at the end."""
    found = []
    yield found
    print("\n\n" + "\n".join(found))


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:4x4", "v5p:2x2x1", "v6e:16x16", "v7x:2x2x1"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published(name, topology, rows):
    config, programs = PUBLISHED[name]
    where = plan.topology(topology)
    devices = len(where.devices)
    config = dataclasses.replace(config, batch_size=-(-config.batch_size // devices) * devices)
    part, compiled = next(iter(programs(config, place.mesh(where.devices), "quick").items()))
    program = compiled()
    assert program.fits
    roof = plan.roofline(program, where)
    least, most = plan.estimate(roof, where, rows=program.rows).per_second
    collectives = ", ".join(
        f"{each.runs} {each.kind} of {each.bytes / 2**20:.0f} MiB" for each in program.reading.collectives
    )
    rows.append(
        f"{name:18} {topology:9} {part:21} batch {program.rows:5} {program.parameters / 1e6:6.1f} M parameters, peak "
        f"{program.peak / 2**30:5.2f} GiB, {collectives}; bound by {roof.bound}, {least:,.0f} to {most:,.0f} images/s "
        f"estimated; compiled in {program.seconds:.0f} s"
    )
    assert program.reading.transfers == ()
    assert program.aliased >= program.state
