"""Stands in for the classes that experts derive from, with the questions that a choice asks of them."""

import enum


class FusedMoEActivationFormat(enum.Enum):
    Standard = "standard"
    BatchedExperts = "batched_experts"


class FusedMoEExperts:
    def __init__(self, moe_config, quant_config, max_num_tokens=None, num_dispatchers=None):
        self.moe_config, self.quant_config = moe_config, quant_config
        self.activation_config = moe_config.activation_config
        self.w1_scale, self.w2_scale = quant_config.w1_scale, quant_config.w2_scale

    @staticmethod
    def supports_lora():
        return False

    @staticmethod
    def is_supported_config(cls, moe_config, weight_key, activation_key, activation_format):
        answers = {
            "device": cls._supports_current_device(),
            "no act_and_mul": moe_config.is_act_and_mul or cls._supports_no_act_and_mul(),
            "activation": cls._supports_activation(moe_config.activation),
            "quantization scheme": cls._supports_quant_scheme(weight_key, activation_key),
            "parallel config": cls._supports_parallel_config(moe_config.moe_parallel_config),
            "activation format": activation_format == cls.activation_format(),
            "LoRA": not moe_config.is_lora_enabled or cls.supports_lora(),
        }
        no = [what for what, supported in answers.items() if not supported]
        return (False, f"kernel does not support {no[0]}") if no else (True, None)


class FusedMoEExpertsModular(FusedMoEExperts):
    pass
