"""Slices by name."""

import os
import subprocess
import sys

import pytest

from jaxgen import plan
from jaxgen.plan.topology import parsed


@pytest.mark.parametrize(
    ("name", "shape", "slices"),
    [("v4:2x2x1", (2, 2, 1), 1), ("v5e:1x1", (1, 1), 1), ("v5e:4x4*2", (4, 4), 2), ("v6e:16x16", (16, 16), 1)],
)
def test_names(name, shape, slices):
    family, got, count = parsed(name)
    assert (got, count) == (shape, slices)
    assert family is plan.FAMILIES[name.partition(":")[0]]


@pytest.mark.parametrize(
    "name", ["v5e", "v5e:4", "v5e:4x4x4", "v5p:2x2", "v9:2x2", "v5e:0x2", "v5e:2x2*0", "", "v5e:2x2 ", "tpu v5e:2x2"]
)
def test_other_names_are_refused_with_families_and_forms(name):
    with pytest.raises(ValueError, match=r"FAMILY:AxB for v5e, v6e or FAMILY:AxBxC for v4, v5p, v7x.*got '") as error:
        parsed(name)
    assert repr(name) in str(error.value)


def test_ways_out_of_a_chip():
    """A ring has two, a line one, an axis of one chip none."""
    chip = plan.FAMILIES["v5e"].chip
    ways = {
        shape: plan.Topology("", chip, shape, 1, []).interconnect / chip.link
        for shape in [(1, 1), (2, 2), (4, 8), (8, 16), (16, 16)]
    }
    assert ways == {(1, 1): 0, (2, 2): 2, (4, 8): 2, (8, 16): 3, (16, 16): 4}
    deep = plan.FAMILIES["v5p"].chip
    assert plan.Topology("", deep, (4, 4, 4), 1, []).interconnect == 6 * deep.link
    assert plan.Topology("", deep, (2, 2, 1), 1, []).interconnect == 2 * deep.link


def test_links_add_up_to_what_is_published_of_chips():
    links = {"v5e": 4, "v6e": 4, "v5p": 6, "v7x": 6}
    published = {"v5e": 400e9, "v6e": 800e9, "v5p": 1200e9, "v7x": 1200e9}
    for family, both_ways in published.items():
        assert plan.FAMILIES[family].chip.link * 2 * links[family] == both_ways


@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize(
    ("name", "chips", "devices"),
    [("v5e:1x1", 1, 1), ("v5e:2x2", 4, 4), ("v4:2x2x1", 4, 4), ("v5p:2x2x1", 4, 4), ("v6e:16x16", 256, 256),
     ("v7x:2x2x1", 4, 8), ("v5e:2x2*2", 8, 8), ("v5p:1x1x1", 1, 1)],
)  # fmt: skip
def test_devices(name, chips, devices):
    topology = plan.topology(name)
    assert (topology.chips, len(topology.devices)) == (chips, devices)
    assert len(topology.devices) == chips * topology.chip.cores
    assert {device.platform for device in topology.devices} == {"tpu"}
    assert len({getattr(device, "slice_index", 0) for device in topology.devices}) == topology.slices


@pytest.mark.usefixtures("libtpu")
def test_slices_that_no_pod_has_are_refused():
    with pytest.raises(ValueError, match="`topology` 'v5e:3x5' is refused by libtpu: "):
        plan.topology("v5e:3x5")


def outside(code, **environment):
    """What a process of its own says."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TPU_")}
    environment = {**inherited, "JAX_PLATFORMS": "cpu", **environment}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_without_libtpu_one_line_says_how_to_get_it():
    code = (
        "import sys; sys.modules['libtpu'] = None\n"
        "from jaxgen import plan\n"
        "try: plan.topology('v5e:2x2')\n"
        "except FileNotFoundError as error: print(error)"
    )
    assert outside(code).endswith('libtpu, which is not installed: pip install "jaxgen[tpu-aot]"')


@pytest.mark.usefixtures("libtpu")
def test_what_the_user_has_set_stays():
    code = (
        "import os; from jaxgen import plan; plan.topology('v5e:2x2')\n"
        "print(os.environ['TPU_WORKER_HOSTNAMES'], os.environ['TPU_SKIP_MDS_QUERY'])"
    )
    assert outside(code, TPU_WORKER_HOSTNAMES="127.0.0.1") == "127.0.0.1 1"
