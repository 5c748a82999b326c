"""Defines the base class of all sections of a recipe, and the types that their fields share.

    class LossSettings(Section):
        mlm: float = Field(0.2, ge=0, description="Weight of the masked cross-entropy")

Each section is also part of the parameter form of the Prefect deployments, which shows its docstring and the
descriptions of its fields.
"""

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

Beta = Annotated[float, Field(ge=0, lt=1)]

Seed = Annotated[int, Field(ge=0, lt=2**32)]

Layer = Annotated[int, Field(ge=0, lt=1000)]

Dtype = Literal["auto", "float32", "bfloat16"]


class Section(BaseModel):
    """One section of a recipe. It is immutable and rejects unknown fields."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        # Heading of the section in the Prefect form.
        model_title_generator=lambda model: model.__name__.removesuffix("Settings"),
    )


S = TypeVar("S", bound=Section)
