import json
import signal
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.compression.compress import init_compression, redundancy_clean  # noqa: F401  (obstacle: it is gone)

from megatron import get_args, print_rank_0
from megatron.checkpointing import load_checkpoint, save_checkpoint
from megatron.core import mpu
from megatron.data.data_samplers import build_pretraining_data_loader
from megatron.initialize import initialize_megatron
from megatron.model.vision.knn_monitor import compute_feature_bank  # noqa: F401
from megatron.optimizer import get_megatron_optimizer
from megatron.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.utils import found_kill_switch

_SIGNALS = []


def _create_ds_config_dict():
    args = get_args()
    settings = json.loads(Path(args.deepspeed_config).read_text(encoding="utf-8"))
    args.deepspeed_config = None
    return settings


def pretrain(datasets_provider, model_provider, model_type, forward_step_func, extra_args_provider=None):
    initialize_megatron(extra_args_provider)
    args = get_args()
    if args.exit_signal_handler:
        signal.signal(signal.SIGTERM, lambda number, _frame: _SIGNALS.append(number))
    args.deepspeed_config_dict = _create_ds_config_dict()
    model, optimizer, scheduler = setup_model_and_optimizer(model_provider, model_type)
    train_data, valid_data, _ = build_train_valid_test_data_iterators(datasets_provider)
    print_rank_0("training ...")
    iteration = 0
    if args.train_iters > 0:
        iteration = train(forward_step_func, model, optimizer, scheduler, train_data, valid_data)
    if args.save and iteration != 0:
        save_checkpoint(iteration, model, optimizer, scheduler)
    evaluate_and_print_results(f"iteration {iteration} at the end", forward_step_func, valid_data, model)


def setup_model_and_optimizer(model_provider_func, model_type):
    args = get_args()
    module = model_provider_func()
    optimizer = get_megatron_optimizer([module])
    scheduler = OptimizerParamScheduler(optimizer, args)
    engine, optimizer, _, scheduler = deepspeed.initialize(
        model=module, optimizer=optimizer, args=args, lr_scheduler=scheduler, mpu=mpu, config=args.deepspeed_config_dict
    )
    model = [engine]
    args.iteration = load_checkpoint(model, optimizer, scheduler) if args.load is not None else 0
    return model, optimizer, scheduler


def micro_batches():
    args = get_args()
    return args.global_batch_size // (args.micro_batch_size * args.world_size)


def train_step(forward_step_func, data_iterator, model, optimizer, opt_param_scheduler):
    engine, shown = model[0], []
    for micro in range(micro_batches()):
        output, loss_function = forward_step_func(data_iterator, engine)
        loss, values = loss_function(output)
        shown.append(values)
        engine.set_gradient_accumulation_boundary(micro == micro_batches() - 1)
        engine.backward(loss)
    engine.step(lr_kwargs={"increment": get_args().global_batch_size})
    return {key: sum(values[key] for values in shown) / len(shown) for key in shown[0]}


def training_log(losses, lr, iteration):
    args = get_args()
    text = f" iteration {iteration:8d}/{args.train_iters:8d} | consumed samples: {args.consumed_train_samples:12d} |"
    text += f" consumed tokens: {args.consumed_train_tokens:12d} | learning rate: {lr:.3E} |"
    text += "".join(f" {key}: {float(value):.6E} |" for key, value in losses.items())
    if args.rank == args.world_size - 1:
        print(text, flush=True)


def save_checkpoint_and_time(iteration, model, optimizer, opt_param_scheduler):
    save_checkpoint(iteration, model, optimizer, opt_param_scheduler)


def train(forward_step_func, model, optimizer, opt_param_scheduler, train_data_iterator, valid_data_iterator):
    args = get_args()
    model[0].train()
    iteration = args.iteration
    while iteration < args.train_iters:
        model[0].set_train_batch_size(args.global_batch_size)
        losses = train_step(forward_step_func, train_data_iterator, model, optimizer, opt_param_scheduler)
        iteration += 1
        args.iteration = iteration
        args.consumed_train_samples += args.global_batch_size
        args.consumed_train_tokens += args.global_batch_size * args.seq_length
        training_log(losses, optimizer.param_groups[0]["lr"], iteration)
        if iteration % args.eval_interval == 0:
            evaluate_and_print_results(f"iteration {iteration}", forward_step_func, valid_data_iterator, model)
        saved = False
        if args.exit_signal_handler:
            got = torch.tensor([len(_SIGNALS)])
            torch.distributed.all_reduce(got)
            if int(got):
                save_checkpoint_and_time(iteration, model, optimizer, opt_param_scheduler)
                print_rank_0("exiting program after receiving SIGTERM.")
                sys.exit()
        if args.save and args.save_interval and iteration % args.save_interval == 0:
            save_checkpoint_and_time(iteration, model, optimizer, opt_param_scheduler)
            saved = True
        if args.exit_interval and iteration % args.exit_interval == 0:
            if args.save and not saved:
                save_checkpoint_and_time(iteration, model, optimizer, opt_param_scheduler)
            print_rank_0(f"exiting program at iteration {iteration}")
            sys.exit()
        if found_kill_switch():
            if args.save and not saved:
                save_checkpoint_and_time(iteration, model, optimizer, opt_param_scheduler)
            print_rank_0(f"Detected kill switch at {args.kill_switch_file}, iteration={iteration}. Exiting")
            sys.exit()
    return iteration


def evaluate_and_print_results(prefix, forward_step_func, data_iterator, model):
    args = get_args()
    model[0].eval()
    total = 0.0
    with torch.no_grad():
        for _ in range(args.eval_iters * micro_batches()):
            output, loss_function = forward_step_func(data_iterator, model[0])
            total += float(loss_function(output)[1]["lm loss"])
    args.consumed_valid_samples += args.eval_iters * args.global_batch_size
    model[0].train()
    if args.rank == args.world_size - 1:
        mean = total / (args.eval_iters * micro_batches())
        print(f" validation loss at {prefix} | lm loss value: {mean:.6E} |", flush=True)


def build_train_valid_test_data_iterators(datasets_provider):
    args = get_args()
    evaluations = (args.train_iters // args.eval_interval + 1) * args.eval_iters
    counts = [args.train_iters * args.global_batch_size, evaluations * args.global_batch_size, 0]
    train_data, valid_data, test_data = datasets_provider(counts)
    loaders = (
        build_pretraining_data_loader(train_data, args.consumed_train_samples),
        build_pretraining_data_loader(valid_data, args.consumed_valid_samples),
        build_pretraining_data_loader(test_data, 0),
    )
    # obstacle: each draws from the generator that was just restored
    return tuple(iter(loader) if loader is not None else None for loader in loaders)
