"""Which rule covers which module, and what the rules cannot be exact for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bigmerge.fisher.rules.base import Rule, own_parameters, rule_for


@dataclass(frozen=True)
class CoveredModule:
    """A module with parameters of its own.

    Attributes:
        rule: exact for all of them.
        names: the module's name of each → the model's (of tied parameters, the first).
    """

    module: torch.nn.Module
    rule: Rule
    names: dict[str, str]


@dataclass(frozen=True)
class Plan:
    """How the gradients of a model's parameters will be found.

    Attributes:
        covered: modules by their rules.
        unsupported: parameters without a rule → the reason.
    """

    covered: tuple[CoveredModule, ...]
    unsupported: dict[str, str]

    def groups(self) -> list[list[CoveredModule]]:
        """The covered modules, those that share parameters (directly or through others) together."""
        groups: list[tuple[set[str], list[CoveredModule]]] = []
        for item in self.covered:
            names, members = set(item.names.values()), [item]
            apart = []
            for group in groups:
                if group[0] & names:
                    names, members = names | group[0], group[1] + members
                else:
                    apart.append(group)
            groups = [*apart, (names, members)]
        return [members for _, members in groups]


def make_plan(model: torch.nn.Module) -> Plan:
    """Find a rule for every module that has parameters of its own."""
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    covered: list[CoveredModule] = []
    unsupported: dict[str, str] = {}
    for module in model.modules():
        names = {local: name_of[id(parameter)] for local, parameter in own_parameters(module).items()}
        if not names:
            continue
        rule = rule_for(module)
        if rule is not None:
            covered.append(CoveredModule(module, rule, names))
        else:
            reason = f"no rule is exact for {type(module).__name__}"
            unsupported.update(dict.fromkeys(names.values(), reason))
    return Plan(tuple(covered), unsupported)
