"""What modules keep of a graph: it follows them to their device, is in no checkpoint, and DDP leaves it alone."""

from torch import nn

__all__ = ["HoldsGraph", "leave_graph_out_of_ddp"]


class HoldsGraph:
    """Of a module whose buffers with `persistent=False` are of the graph, the same in all processes of DDP.

    Buffers, so that they follow the module to its device; not persistent, so that they are in no checkpoint.
    """


def leave_graph_out_of_ddp(model: nn.Module) -> None:
    """Have DDP not send the graph from rank 0 to the others at each step, as it does with a module's other buffers.

    Each rank has made it from the same files. To be called before DDP is given the model, when the graph is there.

    Args:
        model: What DDP is given; it, or modules in it, are `HoldsGraph`.
    """
    model._ddp_params_and_buffers_to_ignore = [  # type: ignore[assignment]  # no tensor: a list that DDP looks for
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if isinstance(module, HoldsGraph)
        for name, _ in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set
    ]
