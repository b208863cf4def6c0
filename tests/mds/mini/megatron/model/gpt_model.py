import torch

from megatron.model.language_model import TransformerLanguageModel


class GPTModel(torch.nn.Module):
    def __init__(self, args):
        super().__init__()
        self.language_model = TransformerLanguageModel(args)
        self._language_model_key = "language_model"

    def forward(self, tokens, labels):
        logits, losses = self.language_model(tokens)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()), losses

    def state_dict_for_save_checkpoint(self, prefix="", keep_vars=False):
        state = self.language_model.state_dict_for_save_checkpoint(prefix=prefix, keep_vars=keep_vars)
        experts = state.pop("moe_state_dict")
        return {self._language_model_key: state, **experts}

    def load_state_dict(self, state_dict, strict=True):
        experts = {key: state_dict.pop(key) for key in list(state_dict) if "expert" in key and "gate.wg" not in key}
        state = dict(state_dict[self._language_model_key])
        state["moe_state_dict"] = experts
        self.language_model.load_state_dict(state, strict=strict)

    def universal_checkpoint_info(self):
        return {"vocabulary_parameter_patterns": ["language_model.embedding.weight"]}
