"""Whether a token's result depends on the tokens beside it, by bits."""

import torch

from expert_layer import Call

# Numbers of tokens, the last of which all others are the first rows of.
TOKENS = (1, 2, 3, 8, 17, 64, 100, 256, 777, 1024, 4096)


def differing_values(loaded, shape, tokens=TOKENS, seed=3):
    """-> by number of tokens: how many values of these first rows differ from the same rows among the most tokens, and
    of how many; and `shuffled`: the same for all tokens in another order."""
    call = Call(shape, max(tokens), seed)
    # The first token has an expert here, so that no call is without work.
    call = call.of_tokens((call.local >= 0).any(1).to(torch.int8).argsort(descending=True, stable=True))
    order = torch.randperm(call.tokens, generator=torch.Generator().manual_seed(seed)).to(call.x.device)
    whole = rows_of(loaded, call)
    found = {}
    for count in tokens:
        if count < call.tokens:
            found[count] = compared(rows_of(loaded, call.of_tokens(order.new_tensor(range(count)))), whole[:count])
    found["shuffled"] = compared(rows_of(loaded, call.of_tokens(order)), whole[order])
    return found


def rows_of(loaded, call):
    prepared = loaded.prepare([call])
    out = prepared.outs[0].fill_(float("nan"))
    prepared.calls[0]()
    prepared.check(0)
    if out.isnan().any():
        raise AssertionError(f"{call.tokens} tokens: a value was not written, or is NaN")
    return out


def compared(rows, others):
    """-> values whose bits differ, of how many."""
    return int((rows.view(torch.int16) != others.view(torch.int16)).sum()), rows.numel()
