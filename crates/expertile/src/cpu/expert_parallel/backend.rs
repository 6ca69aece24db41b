//! The verbs of every layer: an engine that is written once runs expert-parallel, too.

use super::{ExpertParallelChoice, ExpertParallelLayer};
use crate::backend::{Backend, ExpandedRows, ExpertLayer, Ids, LayerInputs};
use crate::cpu::Cpu;
use crate::cpu::backend::matrix;
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::layer::{LayerConfig, LayerShape};
use crate::routing::TopkIds;
use half::bf16;

impl ExpertLayer<Cpu> for ExpertParallelLayer {
    type Choice = ExpertParallelChoice;

    fn shape(&self) -> &LayerShape {
        self.shape()
    }

    fn config(&self) -> &LayerConfig {
        self.config()
    }

    fn max_tokens(&self) -> usize {
        self.max_tokens()
    }

    fn choice(&self, tokens: usize) -> Result<ExpertParallelChoice> {
        self.choice(tokens)
    }

    fn workspace_bytes(&self, tokens: usize) -> Result<usize> {
        self.workspace_bytes(tokens)
    }

    fn workspace(&self, tokens: usize) -> Result<Vec<u8>> {
        self.local().cpu().allocate(self.workspace_bytes(tokens)?)
    }

    /// Ids are global, and there is no expert map: the placement says where experts are.
    fn run<T: Float, O: Float>(
        &self,
        inputs: &LayerInputs<'_, Cpu, T>,
        workspace: &mut Vec<u8>,
        output: &mut Vec<O>,
    ) -> Result<()> {
        let (tokens, topk) = (inputs.tokens, self.config().topk);
        let operands = (|| {
            let (argument, actual) = ("topk_ids", inputs.topk_ids.dtype());
            if actual != self.config().ids {
                return Err(Error::Dtype { argument, actual, expected: self.config().ids.as_prepared() });
            }
            if inputs.expert_map.is_some() {
                let (actual, backend) = ("given", "expert-parallel");
                let expected = "none: the placement says where experts are";
                return Err(Error::Unsupported { argument: "expert_map", actual, backend, expected });
            }
            let ids = match inputs.topk_ids {
                Ids::I32(ids) => TopkIds::I32(matrix("topk_ids", ids, tokens, topk)?),
                Ids::I64(ids) => TopkIds::I64(matrix("topk_ids", ids, tokens, topk)?),
            };
            let hidden_states = matrix("hidden_states", inputs.hidden_states, tokens, self.shape().hidden())?;
            let topk_weights = matrix("topk_weights", inputs.topk_weights, tokens, topk)?;
            self.inputs(hidden_states, ids, topk_weights, workspace.len(), output)
        })();
        self.run_checked(operands, workspace, output, &mut |_| {})
    }

    /// A call of the CPU has reported everything when it returns.
    fn check(&self, _: &mut Vec<u8>) -> Result<()> {
        Ok(())
    }

    fn expanded_workspace(&self, m_sum: usize) -> Result<Vec<u8>> {
        ExpertLayer::expanded_workspace(self.local(), m_sum)
    }

    /// This rank's experts alone: nothing is exchanged.
    fn run_expanded<T: Float>(
        &self,
        rows: &ExpandedRows<'_, Cpu, T>,
        workspace: &mut Vec<u8>,
        out: &mut Vec<bf16>,
    ) -> Result<()> {
        ExpertLayer::run_expanded(self.local(), rows, workspace, out)
    }
}
