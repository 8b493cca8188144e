"""Every path of a workspace, named once. Stages and flows take a Layout and never spell a path."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Layout:
    """The files of one workspace (a checkout of this repository).

    Args:
        root: The folder that holds dvc.yaml and params.yaml.
    """

    root: Path

    @property
    def params(self) -> Path:
        return self.root / "params.yaml"

    @property
    def pipeline(self) -> Path:
        return self.root / "dvc.yaml"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def raw(self) -> Path:
        """Labelled images: raw/LABEL/... or raw/SPLIT/LABEL/..., or shards of them, tracked by raw.dvc."""
        return self.data / "raw"

    @property
    def raw_pointer(self) -> Path:
        return self.data / "raw.dvc"

    @property
    def raw_changes(self) -> Path:
        """The log of what people did to raw/, tracked by git beside raw.dvc (flows/raw_log.py)."""
        return self.data / "raw-changes.jsonl"

    @property
    def images(self) -> Path:
        """The manifest: one row an image in raw/ (index_images)."""
        return self.data / "manifest" / "images.parquet"

    @property
    def images_partial(self) -> Path:
        """Parts of the manifest that an interrupted index_images had saved; not a DVC output."""
        return self.data / "manifest" / ".images.partial"

    @property
    def stamps(self) -> Path:
        """Which images have not changed since index_images read them; not a DVC output."""
        return self.data / "manifest" / ".stamps"

    @property
    def accepted(self) -> Path:
        """The rows of the manifest that passed validation; what every later stage reads (validate_data)."""
        return self.data / "manifest" / "accepted.parquet"

    @property
    def classes(self) -> Path:
        """The class map: the id of every label that was ever accepted (validate_data)."""
        return self.data / "manifest" / "classes.json"

    @property
    def accepted_summary(self) -> Path:
        """What the last accepted sets were like, to tell a shift by (validate_data)."""
        return self.data / "manifest" / "accepted_summary.json"

    @property
    def quarantine(self) -> Path:
        """path,reason of the images that later stages leave out (validate_data)."""
        return self.data / "manifest" / "quarantine.csv"

    @property
    def backbone_dir(self) -> Path:
        return self.data / "backbone"

    @property
    def backbone_card(self) -> Path:
        """Architecture, digests, licence and preprocessing of the backbone."""
        return self.backbone_dir / "backbone.json"

    @property
    def backbone_weights(self) -> Path:
        return self.backbone_dir / "weights.safetensors"

    @property
    def preprocess_onnx(self) -> Path:
        """Images uint8 (N, H, W, 3) → pixels float32 (N, 3, S, S)."""
        return self.backbone_dir / "preprocess.onnx"

    @property
    def trunk_onnx(self) -> Path:
        """Pixels float32 (N, 3, S, S) → embedding float32 (N, D), frozen."""
        return self.backbone_dir / "trunk.onnx"

    @property
    def pretrained_bundle_dir(self) -> Path:
        """A backbone's own classifier as a bundle (`tanuki pretrained export`); no DVC output."""
        return self.data / "pretrained" / "bundle"

    @property
    def features_dir(self) -> Path:
        """The feature store, content-addressed and append-only."""
        return self.data / "features"

    @property
    def head_dir(self) -> Path:
        return self.data / "models" / "head"

    @property
    def finetuned_dir(self) -> Path:
        return self.data / "models" / "finetuned"

    @property
    def checkpoints_dir(self) -> Path:
        """Where an interrupted fine-tuning goes on from; not a DVC output."""
        return self.data / "models" / "checkpoints"

    @property
    def bundle_dir(self) -> Path:
        return self.data / "bundle"

    @property
    def reports_dir(self) -> Path:
        return self.data / "reports"

    def report(self, stage: str) -> Path:
        """The metrics file of a stage."""
        return self.reports_dir / f"{stage}.json"

    def times(self, stage: str) -> Path:
        """Seconds of a stage, apart from its report, which tells no time (train_head, finetune)."""
        return self.reports_dir / f"{stage}_times.json"

    @property
    def epochs(self) -> Path:
        """Loss and accuracy after each epoch, written while finetune runs."""
        return self.reports_dir / "finetune_epochs.csv"

    @property
    def validation_dir(self) -> Path:
        """Data Docs and the pictures of what failed."""
        return self.reports_dir / "validation"

    @property
    def evaluation_dir(self) -> Path:
        """Predictions on the test images, plots and the model card."""
        return self.reports_dir / "evaluation"

    @property
    def predictions(self) -> Path:
        """What the bundle answers for each test image (evaluate); what the gate judges by."""
        return self.evaluation_dir / "predictions.parquet"

    @property
    def robustness(self) -> Path:
        """What the bundle answers for some of them, corrupted (evaluate); the gate asks the champion the same."""
        return self.evaluation_dir / "robustness.csv"

    @property
    def evaluation_page(self) -> Path:
        """All of the evaluation in one file, for people."""
        return self.evaluation_dir / "index.html"

    @property
    def model_card(self) -> Path:
        return self.evaluation_dir / "model_card.md"

    @property
    def decision(self) -> Path:
        """What the gate said last, for scripts; no DVC output."""
        return self.reports_dir / "gate" / "decision.json"

    @property
    def decision_page(self) -> Path:
        """The same for people."""
        return self.reports_dir / "gate" / "index.html"

    @property
    def suspects(self) -> Path:
        """path,label,suggested,... of images whose label is probably wrong, the most probable first; no DVC output."""
        return self.reports_dir / "suspects" / "suspects.csv"

    @property
    def suspects_sheet(self) -> Path:
        """A picture of them."""
        return self.reports_dir / "suspects" / "suspects.png"

    @property
    def drift_dir(self) -> Path:
        """The last look for drift: drift.json for scripts, index.html for people; no DVC output."""
        return self.reports_dir / "drift"

    @property
    def captures_dir(self) -> Path:
        """Where `tanuki drift` looks for what a server captured, unless told otherwise."""
        return self.data / "captures"

    @property
    def compare_dir(self) -> Path:
        """What each way to learn came to, and the table and picture of them; no DVC output."""
        return self.reports_dir / "compare"

    @property
    def compare_ways(self) -> Path:
        """Which ways there are, for the recipe that draws them up."""
        return self.compare_dir / "ways.json"

    @property
    def compare_sandbox(self) -> Path:
        """A clone of this workspace that `tanuki compare` runs its experiments in."""
        return self.root / ".dvc" / "tmp" / "tanuki-compare"

    @property
    def published_signature(self) -> Path:
        """The signature of the published version, for git: data/bundle is DVC's, and was made before anybody signed."""
        return self.data / "bundle.sig"

    @property
    def registry_dir(self) -> Path:
        """Immutable model versions and the champion pointer. DVC never touches it."""
        return self.data / "registry"

    @property
    def run_metrics_dir(self) -> Path:
        """What Prometheus is told of runs (flows/run_metrics.py); beside the versions, where a server finds it."""
        return self.registry_dir / "metrics"

    @property
    def dvc_lock(self) -> Path:
        """DVC's record of what each stage read and wrote."""
        return self.root / "dvc.lock"

    @property
    def dvc_rwlock(self) -> Path:
        """DVC's list of the processes that read and write its files."""
        return self.root / ".dvc" / "tmp" / "rwlock"

    @property
    def dvc_lock_copy(self) -> Path:
        """The last whole one."""
        return self.root / ".dvc" / "tmp" / "tanuki-dvc.lock"

    @property
    def server_log(self) -> Path:
        """What the last temporary Prefect server had to say."""
        return self.root / ".dvc" / "tmp" / "tanuki-prefect.log"

    @property
    def lock(self) -> Path:
        """Held by whoever changes the workspace."""
        return self.root / ".dvc" / "tmp" / "tanuki.lock"

    @property
    def inbox(self) -> Path:
        """Where others may drop labelled images for the schedule `ingest`; in neither git nor DVC."""
        return self.data / "inbox"

    @property
    def pretrained_dir(self) -> Path:
        """Backbones that `tanuki pretrain` made; in neither git nor DVC."""
        return self.data / "pretrained"

    @property
    def operations_dir(self) -> Path:
        """What `tanuki up` keeps: logs, the clones that runs work in, Prefect's database; in neither git nor DVC."""
        return self.root / ".tanuki"

    @property
    def prefect_home(self) -> Path:
        """PREFECT_HOME of `tanuki up`."""
        return self.operations_dir / "prefect"

    @property
    def up_lock(self) -> Path:
        """Held by `tanuki up` while it runs."""
        return self.operations_dir / "up.lock"

    @property
    def up_facts(self) -> Path:
        """Where the parts of the running `tanuki up` answer, and what was deployed."""
        return self.operations_dir / "up.json"

    @property
    def logs_dir(self) -> Path:
        """A log file for each part of `tanuki up`."""
        return self.operations_dir / "logs"

    @property
    def clones_dir(self) -> Path:
        """The clones that scheduled runs work in (flows/clones.py)."""
        return self.operations_dir / "clones"

    @property
    def fence(self) -> Path:
        """The numbers of the leases that were given and admitted (flows/lease.py)."""
        return self.operations_dir / "fence.json"

    @property
    def signals(self) -> Path:
        """Which signals are raised (flows/signals.py)."""
        return self.operations_dir / "signals.json"

    @property
    def schedules(self) -> Path:
        """The deployments and their schedules, for `prefect deploy --prefect-file`."""
        return self.root / "deploy" / "prefect.yaml"
