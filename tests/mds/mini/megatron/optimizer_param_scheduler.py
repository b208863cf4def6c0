class OptimizerParamScheduler:
    """Learning rate as a function of the samples seen."""

    def __init__(self, optimizer, args):
        self.optimizer, self.lr, self.min_lr = optimizer, args.lr, args.min_lr
        self.warmup = args.lr_warmup_iters * args.global_batch_size
        self.decay = args.lr_decay_iters * args.global_batch_size
        self.num_steps = 0
        self.step(0)

    def step(self, increment):
        self.num_steps += increment
        if self.num_steps < self.warmup:
            lr = self.lr * self.num_steps / self.warmup
        else:
            lr = self.min_lr + (self.lr - self.min_lr) * max(0.0, 1.0 - self.num_steps / self.decay)
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def state_dict(self):
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state):
        self.num_steps = 0
        self.step(state["num_steps"])
