from . import mpu, tensor_parallel

__all__ = ["mpu", "tensor_parallel"]
