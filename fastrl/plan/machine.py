"""What a processor can do: rates and sizes that turn operations and bytes into seconds."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One processor of a cluster, and its links.

    Attributes:
        name: what the command line calls it.
        source: where the figures come from, in words; printed with every plan.
        peak: dense bf16 operations per second by the data sheet, which utilisation (MFU) is a share of.
        products: operations per second that large matrix products reach.
        attention: operations per second that the attention kernel reaches, forward and backward.
        bandwidth: bytes per second of reading plus writing device memory.
        memory: bytes of device memory.
        launch: seconds from one kernel's start to the next one's when the host is what limits.
        link: bytes per second one processor sends to others of its node.
        network: bytes per second one processor sends to other nodes.
        per_node: processors of one node.
        layers: bytes per second of the layers' elementwise kernels where that is less than `bandwidth` (a CPU, whose
            arithmetic and fresh memory cost more than the traffic); 0 where it is not.
        logit: seconds of the loss on one logit, forward and gradient, likewise.
    """

    name: str
    source: str
    peak: float
    products: float
    attention: float
    bandwidth: float
    memory: float
    launch: float
    link: float
    network: float
    per_node: int = 8
    layers: float = 0.0
    logit: float = 0.0


# Products, bandwidth and memory of the H200 were measured on one. The other machines' data sheets are scaled by what
# the H200 reached of its own: 0.80 of the peak of 989 TFLOP/s, 0.90 of 4.8 TB/s. Attention at 0.55 of the products'
# rate, 6 us for a launch, 0.8 of the links' nominal rate are assumptions.
H200 = Machine(
    name="h200",
    source="products, copies and memory measured on one H200; attention, launches and links assumed",
    peak=989e12,
    products=790e12,
    attention=435e12,
    bandwidth=4.3e12,
    memory=139 * GIB,
    launch=6e-6,
    link=360e9,
    network=40e9,
)
MACHINES: dict[str, Machine] = {
    machine.name: machine
    for machine in (
        H200,
        Machine(
            name="h100",
            source="data sheet, scaled by what an H200 reached of its own; not measured",
            peak=989e12,
            products=790e12,
            attention=435e12,
            bandwidth=3.0e12,
            memory=79 * GIB,
            launch=6e-6,
            link=360e9,
            network=40e9,
        ),
        Machine(
            name="a100",
            source="data sheet, scaled by what an H200 reached of its own; not measured",
            peak=312e12,
            products=250e12,
            attention=137e12,
            bandwidth=1.8e12,
            memory=79 * GIB,
            launch=6e-6,
            link=240e9,
            network=20e9,
        ),
        Machine(
            name="b200",
            source="data sheet, scaled by what an H200 reached of its own; not measured",
            peak=2250e12,
            products=1800e12,
            attention=990e12,
            bandwidth=7.2e12,
            memory=178 * GIB,
            launch=6e-6,
            link=720e9,
            network=40e9,
        ),
    )
}


def machine_of(name: str) -> Machine:
    """The machine of that name.

    Raises:
        ValueError: none is called so.
    """
    if name not in MACHINES:
        raise ValueError(f"no machine is called {name!r}; there are {', '.join(MACHINES)}")
    return MACHINES[name]
