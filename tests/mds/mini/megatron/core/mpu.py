import torch

_groups = {}


def _group(name):
    if name not in _groups:
        mine = None
        if name == "data":
            mine = torch.distributed.new_group(range(torch.distributed.get_world_size()))
        else:
            for rank in range(torch.distributed.get_world_size()):
                group = torch.distributed.new_group([rank])
                mine = group if rank == torch.distributed.get_rank() else mine
        _groups[name] = mine
    return _groups[name]


def get_data_parallel_group():
    return _group("data")


def get_data_parallel_rank():
    return torch.distributed.get_rank()


def get_data_parallel_world_size():
    return torch.distributed.get_world_size()


def get_model_parallel_group():
    return _group("model")


get_tensor_model_parallel_group = get_model_parallel_group


def get_model_parallel_rank():
    return 0


get_tensor_model_parallel_rank = get_model_parallel_rank


def get_model_parallel_world_size():
    return 1


get_tensor_model_parallel_world_size = get_model_parallel_world_size
get_pipeline_model_parallel_world_size = get_model_parallel_world_size
