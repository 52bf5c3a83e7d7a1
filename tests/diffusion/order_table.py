"""Prints the observed order of every solver on every path: ``python -m tests.diffusion.order_table``."""

from functools import partial

from jaxgen import diffusion
from tests.diffusion import oracle


def main() -> None:
    print(f"{'solver':<24}{'nominal':>8}", *(f"{name:>15}" for name in oracle.PATHS))
    kinds = [
        ("flow of a Gaussian", oracle.flow_error, {**oracle.ORDERS, "ddim_inversion": (diffusion.ddim_inversion, 1)}),
        ("flow of a mixture", oracle.mixture_error, oracle.ORDERS),
        ("variance", oracle.variance_error, oracle.STOCHASTIC),
        ("mean", partial(oracle.mean_error, eta=0.5), oracle.MEAN_ORDERS),
    ]
    for kind, error, solvers in kinds:
        print(f"-- {kind}")
        for name, (build, nominal) in solvers.items():
            orders = (oracle.observed_order(partial(error, path, build)) for path in oracle.PATHS.values())
            print(f"{name:<24}{nominal:>8}", *(f"{order:>15.2f}" for order in orders), flush=True)


if __name__ == "__main__":
    main()
