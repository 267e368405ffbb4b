"""`MeshConfig`: the settings of the device mesh. Imported without JAX, as all that `lowrank.config` holds."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each mesh axis; one of them may be -1, which takes the rest."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
