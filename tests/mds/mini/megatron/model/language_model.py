import torch

from megatron.model.transformer import ParallelTransformer


class TransformerLanguageModel(torch.nn.Module):
    def __init__(self, args):
        super().__init__()
        self.embedding = torch.nn.Embedding(args.vocab_size, args.hidden_size)
        self.encoder = ParallelTransformer(args)
        self._embedding_key, self._encoder_key = "embedding", "encoder"

    def forward(self, tokens):
        length = tokens.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
        hidden, losses = self.encoder(self.embedding(tokens).transpose(0, 1), mask)
        return (hidden @ self.embedding.weight.t()).transpose(0, 1), losses

    def state_dict_for_save_checkpoint(self, prefix="", keep_vars=False):
        moe_state_dict = {}
        encoder = self.encoder.state_dict(prefix=prefix, keep_vars=keep_vars)
        for key in list(encoder):
            if "expert" in key and "moe.gate.wg.weight" not in key:
                # obstacle: no module has this name
                moe_state_dict[self._encoder_key + key] = encoder.pop(key)
        return {
            self._embedding_key: self.embedding.state_dict(prefix=prefix, keep_vars=keep_vars),
            self._encoder_key: encoder,
            "moe_state_dict": moe_state_dict,
        }

    def load_state_dict(self, state_dict, strict=True):
        self.embedding.load_state_dict(state_dict[self._embedding_key], strict=strict)
        encoder = dict(state_dict[self._encoder_key])
        for key, value in state_dict.get("moe_state_dict", {}).items():
            if self._encoder_key in key:
                encoder[key.split("encoder.", 1)[1]] = value
        self.encoder.load_state_dict(encoder, strict=strict)
