"""What each kernel demands of its operands: rules, contracts and their registry."""

from contig_pass.contracts import attention, scaled_mm
from contig_pass.contracts.registry import (
    REGISTRY,
    Call,
    Contract,
    register_contract,
    unregister_contract,
)
from contig_pass.errors import ContractError

for _contract in (*scaled_mm.contracts(), *attention.contracts()):
    try:
        REGISTRY.add(_contract)
    except ContractError as error:
        # An op that this version of torch does not have cannot be called either.
        if "unknown op" not in str(error) and "no overload" not in str(error):
            raise

__all__ = ["REGISTRY", "Call", "Contract", "register_contract", "unregister_contract"]
