# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A Memory Head learns one class after the other
#
# MODES is a stream of points in the plane: four classes, each two clouds. They come one class after the other, and each
# point is seen once. A plain perceptron and a Memory Head learn it with the same loop, one point a step, and nothing is
# replayed. Needs `pip install -e .` and a notebook; runs in half a minute.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.nn import functional as F

from mh_lightning import MHLinear
from mh_lightning.callbacks.plots import Plane, draw_accuracy_matrix, draw_decision_surface
from mh_lightning.data import Modes
from mh_lightning.layers import MLP

torch.set_num_threads(1)  # fastest for single points
stream = Modes(scenario="CI")
stream.setup("fit")
train, test = (
    [stream.samples_to_show(split, task, 0) for task in range(stream.num_tasks)] for split in ("train", "test")
)
print([f"task {task + 1}: {stream.name_of_task(task)}, {len(labels)} points" for task, (_, labels) in enumerate(train)])

# %% [markdown]
# ## The stream
# What is there to be learnt in each task:

# %%
figure, all_axes = plt.subplots(1, stream.num_tasks, figsize=(11, 2.9), sharex=True, sharey=True)
for task, (axes, (points, labels)) in enumerate(zip(all_axes, train)):
    axes.scatter(*points.T, s=4, color=f"C{labels[0]}")
    axes.set_title(f"task {task + 1}: {stream.name_of_task(task)}")
figure.tight_layout()

# %% [markdown]
# ## Learning
# An ordinary training loop. After each task we look at the accuracy on all tasks, and at how the plane is divided.


# %%
def plane_of(net, task):
    """How the plane is divided among classes, with the points so far and the keys."""
    left, right, bottom, top = stream.extent()
    y, x = torch.meshgrid(torch.linspace(bottom, top, 150), torch.linspace(left, right, 150), indexing="ij")
    with torch.no_grad():
        classes = net(torch.stack([x.flatten(), y.flatten()], 1)).argmax(1).view(150, 150).numpy()
    points, labels = (np.concatenate(part) for part in zip(*train[: task + 1]))
    keys = net.K[0].numpy().copy() if isinstance(net, MHLinear) else np.zeros((0, 2))
    return Plane(classes, (left, right, bottom, top), points, labels, keys, f"after task {task + 1}")


def learn(net, seed):
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    order = np.random.default_rng(seed)
    accuracies, planes = [], []
    for task, (points, labels) in enumerate(train):
        net.train()
        for place in order.permutation(len(labels)):
            optimizer.zero_grad()
            F.cross_entropy(net(torch.from_numpy(points[[place]])), torch.from_numpy(labels[[place]])).backward()
            optimizer.step()
        net.eval()
        with torch.no_grad():
            accuracies.append([float((net(torch.from_numpy(x)).argmax(1).numpy() == y).mean()) for x, y in test])
        planes.append(plane_of(net, task))
    return np.array(accuracies), planes


# %% [markdown]
# The Memory Head has ten units of one linear layer each; a point is classified by the two units whose keys are closest.
# The perceptron has 25 hidden units. Both have about as many numbers.


# %%
def memory_head():
    return MHLinear.published(
        2, 4, key_mem_units=10, delta=2, distance="euclidean", gamma_alpha=25.0, upd_m="WTA", upd_k="ad_hoc_WTA",
        beta_k=0.01, scramble=True, tau_alpha=0.95, tau_mu=50, tau_eta=50,
    )  # fmt: skip


def perceptron():
    return MLP(2, 4, hidden_features=[25])


results = {}
for name, make in (("perceptron", perceptron), ("Memory Head", memory_head)):
    for seed in range(3):
        torch.manual_seed(seed)
        net = make()
        results[name, seed] = learn(net, seed)
    averages = [results[name, seed][0][-1].mean() for seed in range(3)]
    size = sum(parameter.numel() for parameter in net.parameters())
    print(f"{name}, {size} weights: average accuracy {np.mean(averages):.3f}, seeds {np.round(averages, 3).tolist()}")

# %% [markdown]
# ## How the plane is divided
# The perceptron (above) gives nearly all of the plane to whatever it learnt last. The Memory Head (below) changes only
# where the new points are: their keys (crosses) belong to other units.

# %%
figure, all_axes = plt.subplots(2, stream.num_tasks, figsize=(11, 5.8))
for name, row in zip(("perceptron", "Memory Head"), all_axes):
    for axes, plane in zip(row, results[name, 0][1]):
        draw_decision_surface(axes, plane, stream.class_names)
    row[0].set_ylabel(name)
figure.tight_layout()

# %% [markdown]
# ## What is remembered
# Accuracy on each task (column) after each task has been learnt (row).

# %%
figure, all_axes = plt.subplots(1, 2, figsize=(7, 3.4))
for axes, name in zip(all_axes, ("perceptron", "Memory Head")):
    draw_accuracy_matrix(axes, results[name, 0][0], name)
figure.tight_layout()
