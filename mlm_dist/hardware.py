"""Peak arithmetic rates of devices, to hold a run's own rate against."""

import re

# Device name (a regular expression; the first that is found counts), then dense TFLOP/s of matrix products: of 16-bit
# numbers summed in fp32 (fp16, and bf16 but for those below), and of plain fp32. From the makers' data sheets, whose
# figures with sparsity are halved.
_PEAKS: tuple[tuple[str, float, float], ...] = (
    (r"\bGB200\b", 2500.0, 80.0),
    (r"\bB200\b", 2250.0, 75.0),
    (r"\bB100\b", 1750.0, 60.0),
    (r"\bH100 PCIe\b", 756.0, 51.0),
    (r"\bH100 NVL\b", 835.0, 60.0),
    (r"\b(H100|H200|H800|GH200)\b", 989.4, 67.0),
    (r"\bH20\b", 148.0, 44.0),
    (r"\b(A100|A800)\b", 312.0, 19.5),
    (r"\bA40\b", 149.7, 37.4),
    (r"\bA30\b", 165.0, 10.3),
    (r"\bA10G\b", 70.0, 35.0),
    (r"\bA10\b", 125.0, 31.2),
    (r"\bL40S\b", 362.0, 91.6),
    (r"\bL40\b", 181.0, 90.5),
    (r"\bL4\b", 121.0, 30.3),
    (r"\bRTX 6000 Ada\b", 364.2, 91.1),
    (r"\bRTX A6000\b", 154.8, 38.7),
    (r"\bRTX 5090\b", 209.5, 104.8),
    (r"\bRTX 4090\b", 165.2, 82.6),
    (r"\bRTX 3090\b", 71.0, 35.6),
    (r"\bV100-PCIE\b", 112.0, 14.0),
    (r"\bV100\b", 125.0, 15.7),
    (r"\bT4\b", 65.0, 8.1),
    (r"\bMI325X\b", 1307.4, 163.4),
    (r"\bMI300X\b", 1307.4, 163.4),
    (r"\bMI250X\b", 383.0, 95.7),
)
_WITHOUT_BF16 = r"\b(V100|V100-PCIE|T4)\b"


def dense_peak(device_name: str, precision: str) -> float | None:
    """The device's dense peak in FLOP/s at ``train.precision`` (fp32 without TF32, as torch computes by default), or None where it is not known.

    Args:
        device_name: as ``torch.cuda.get_device_name`` gives it, such as "NVIDIA H100 80GB HBM3".
    """
    for pattern, half, single in _PEAKS:
        if re.search(pattern, device_name, re.IGNORECASE):
            if precision == "fp32":
                return single * 1e12
            if precision.startswith("bf16") and re.search(_WITHOUT_BF16, device_name, re.IGNORECASE):
                return None
            return half * 1e12
    return None
