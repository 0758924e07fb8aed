"""What a user may say about a job beside the question; each field is a flag of `opsin batch`."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from opsin.jobs.sidecar import Kind


class BatchOptions(BaseModel):
    """Which rows are asked, where, and where the answers go; unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sidecar: Kind | None = Field(None, description="write each answer beside its image")
    skip_existing: bool = Field(False, description="skip images that have a sidecar")
    order: Literal["input", "done"] | None = Field(None, description="order of the rows at the end (default: input)")
    report: Path | None = Field(None, description="HTML report, or none (default: OUTPUT.report.html)")
    image_column: str | None = Field(None, description="column with the image (default: found by its name)")
    id: str | None = Field(None, description="column that names the rows (default: their numbers)")
    limit: int | None = Field(None, ge=1, description="ask the first N rows only")
    sample: int | None = Field(None, ge=1, description="ask N rows chosen at random")
    retry_failed: bool = Field(False, description="ask failed rows again")
    new: bool = Field(False, description="add the rows of a changed job to the same output")
    overwrite: bool = Field(False, description="start over and replace the output")
    workers: int | None = Field(
        None, ge=1, description="model processes (default: one a GPU; on a CPU one a core, as memory allows)"
    )
    fetch_private: bool = Field(False, description="fetch images from private hosts and any port, too")
    image_seconds: float = Field(60.0, gt=0, description="longest time to load one image")
