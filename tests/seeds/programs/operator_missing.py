import torch
import torch.nn.functional as F

import fastforward as ff
from fastforward.autoquant import OperatorTable


# This example seems similar to
# the first Linear example
class MyBilinear(torch.nn.Bilinear):
    def forward(self, input1: torch.Tensor, input2: torch.Tensor) -> torch.Tensor:
        return F.bilinear(input1, input2, self.weight, self.bias)


# The bundled table has a row for bilinear, so this one is made without it.
lacking = OperatorTable()
for row in OperatorTable.from_yaml():
    if row.identifier != "bilinear":
        lacking.append_operator(row)

model = MyBilinear(10, 10, 10)
ff.autoquantize(
    model, output_path="quantized.py", use_type_inference=False, force_overwrite=True, operator_table=lacking
)
