"""Federated self-supervised learning; importing it sets the environment and nothing else."""

from fedssl import env as env
