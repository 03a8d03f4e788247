"""Programs of users that never import fastforward, as text to be written and started by the launch tests."""

MODEL = """
import torch


def scaled(x, factor):
    return x * factor


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(8, 16)
        self.second = torch.nn.Linear(16, 4)

    def forward(self, x):
        return scaled(self.second(torch.relu(self.first(x))), 0.5)
"""

# `state(model)` tells from outside what became of a model: its class, and whether its linear layers see rounded inputs.
STATE = """
def state(model):
    classes = [cls.__name__ for cls in type(model).__mro__]
    return "quantized" if "QuantizedModule" in classes else "float"


def levels(model, x):
    seen = []
    original = torch.nn.functional.linear

    def linear(x, *args):
        seen.append(len(x.detach().unique()))
        return original(x, *args)

    torch.nn.functional.linear = linear
    try:
        with torch.no_grad():
            model(x)
    finally:
        torch.nn.functional.linear = original
    return max(seen)
"""

# No torch.optim: its first step imports the compiler, which takes longer than all the rest.
TRAIN = """
def train(model, steps=12):
    parameters = list(model.parameters())  # as an optimizer made now would keep them
    for _ in range(steps):
        x = torch.randn(256, 8)
        loss = (model(x) - x[:, :4]).square().mean()
        loss.backward()
        with torch.no_grad():
            for parameter in parameters:
                parameter -= 0.05 * parameter.grad
                parameter.grad = None
    return loss.item()
"""

MAIN = """
def main():
    torch.manual_seed(0)
    model = Net()
    train(model)
    model.eval()
    print(state(model), levels(model, torch.randn(1024, 8)) <= 256)


if __name__ == "__main__":
    main()
"""

SCRIPT = MODEL + STATE + TRAIN + MAIN
QUANTIZED = "quantized True"
FLOAT = "float False"
