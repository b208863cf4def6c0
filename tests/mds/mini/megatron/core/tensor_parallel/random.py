import contextlib

from deepspeed.accelerator import get_accelerator


class RngStates:
    """Named generators' states, of which `fork` makes one the current for a while."""

    def __init__(self):
        self.states = {}

    def add(self, name, seed):
        before = get_accelerator().get_rng_state()
        get_accelerator().manual_seed(seed)
        self.states[name] = get_accelerator().get_rng_state()
        get_accelerator().set_rng_state(before)

    def get_states(self):
        return dict(self.states)

    def set_states(self, states):
        self.states = dict(states)

    @contextlib.contextmanager
    def fork(self, name="model-parallel-rng"):
        before = get_accelerator().get_rng_state()
        get_accelerator().set_rng_state(self.states[name])
        try:
            yield
        finally:
            self.states[name] = get_accelerator().get_rng_state()
            get_accelerator().set_rng_state(before)


_tracker = RngStates()


def get_cuda_rng_tracker():
    return _tracker
