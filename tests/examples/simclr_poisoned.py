"""SimCLR in a plain PyTorch loop, with Lightly's head, loss and transform and a timm backbone."""

import timm
import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from torch import nn

from cp_plugin import PoisonLoop
from cp_plugin.data import Photos


class SimCLR(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.projection_head = SimCLRProjectionHead(backbone.num_features, 64, 32)

    def forward(self, x):
        return self.projection_head(self.backbone(x).flatten(start_dim=1))


device = "cuda" if torch.cuda.is_available() else "cpu"
model = SimCLR(timm.create_model("test_resnet", num_classes=0)).to(device)
transform = SimCLRTransform(input_size=32, gaussian_blur=0.0)
# Any map-style data set of images: LightlyDataset("path/to/folder", transform=transform), …
dataset = Photos(train=True, patches=4, transform=transform)
dataloader = torch.utils.data.DataLoader(dataset, batch_size=16, shuffle=True, drop_last=True)
criterion = NTXentLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
poison = PoisonLoop(dataloader, model, criterion, rounds=2, noise_steps=2, pgd_steps=2)

for epoch in range(2):
    for batch in poison:
        x0, x1 = batch[0]
        x0 = x0.to(device)
        x1 = x1.to(device)
        z0 = model(x0)
        z1 = model(x1)
        loss = criterion(z0, z1)
        poison.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch: {epoch:>02}, loss: {loss.detach():.5f}")
poison.save("poison.safetensors")
