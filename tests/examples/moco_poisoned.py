"""MoCo v2 in a plain PyTorch loop, with Lightly's head, memory bank and transform."""

import copy

import timm
import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import MoCoV2Transform
from lightly.utils.scheduler import cosine_schedule
from torch import nn

from cp_plugin import PoisonLoop
from cp_plugin.data import Photos


class MoCo(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.projection_head = MoCoProjectionHead(backbone.num_features, 64, 32)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)

    def forward(self, x):
        return self.projection_head(self.backbone(x).flatten(start_dim=1))

    def forward_momentum(self, x):
        key = self.backbone_momentum(x).flatten(start_dim=1)
        return self.projection_head_momentum(key).detach()


device = "cuda" if torch.cuda.is_available() else "cpu"
model = MoCo(timm.create_model("test_resnet", num_classes=0)).to(device)
transform = MoCoV2Transform(input_size=32)
# Any map-style data set of images: LightlyDataset("path/to/folder", transform=transform), …
dataset = Photos(train=True, patches=4, transform=transform)
dataloader = torch.utils.data.DataLoader(dataset, batch_size=16, shuffle=True, drop_last=True)
criterion = NTXentLoss(memory_bank_size=(64, 32)).to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
poison = PoisonLoop(dataloader, model, criterion, rounds=2, noise_steps=2, pgd_steps=2)

for epoch in range(2):
    momentum = cosine_schedule(epoch, 2, 0.996, 1)
    for batch in poison:
        x_query, x_key = batch[0]
        update_momentum(model.backbone, model.backbone_momentum, m=momentum)
        update_momentum(model.projection_head, model.projection_head_momentum, m=momentum)
        x_query = x_query.to(device)
        x_key = x_key.to(device)
        query = model(x_query)
        key = model.forward_momentum(x_key)
        loss = criterion(query, key)
        poison.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch: {epoch:>02}, loss: {loss.detach():.5f}")
poison.save("poison.safetensors")
