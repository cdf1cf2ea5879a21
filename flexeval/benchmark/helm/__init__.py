"""HELM (crfm-helm): scenarios to requests, completions to metrics and run directories.

Only the files of this folder, the task files and `helm_plugin.py` import helm.
"""

from flexeval.benchmark.helm.log import quiet_import

with quiet_import():
    from flexeval.benchmark.helm.models import ModelCard
    from flexeval.benchmark.helm.suite import HelmSuite, OnTask, Scored

__all__ = ["HelmSuite", "ModelCard", "OnTask", "Scored"]
