//! π0-FAST as an anytime task: one step per camera, one for the prefix, one per token.
//!
//! Decoding is greedy among the tokens that can come next: `Action: ` first, then action tokens whose bytes go
//! on as UTF-8 and leave no more coefficients than the chunk has, or the end. So every sequence is a chunk.

use std::sync::Arc;
use std::time::Instant;

use sinew_runtime::{
    ActionChunk, ChunkRequest, Observation, Policy, PolicyError, PolicySpec, Progress,
};

use super::fast::Reading;
use super::{Inputs, PiConfig, PiFast, Preparer};
use crate::anytime::{NOT_BEGUN, NOT_DONE, NOTHING_BEGUN, Ticket, compute};
use crate::checkpoint::Checkpoint;
use crate::heads::fast::{Coefficients, FastTokenizer};
use crate::kernels::Matrix;
use crate::{LoadOptions, ModelError};

const STAGES: [&str; 4] = ["preprocess", "vision", "prefix", "tokens"];
const VISION: usize = 1;
const PREFIX: usize = 2;
const TOKENS: usize = 3;

/// What a sequence of actions begins and ends with.
const BEGIN: &str = "Action: ";
const END: &str = "|";

struct Run {
    ticket: Ticket<4>,
    inputs: Inputs,
    /// Tokens of the images encoded so far.
    images: Vec<Arc<Matrix>>,
    reading: Option<Reading>,
    coefficients: Coefficients,
    /// Action tokens so far.
    said: usize,
    done: bool,
}

/// A π0-FAST policy.
pub struct PiFastPolicy {
    model: PiFast,
    preparer: Preparer,
    tokenizer: FastTokenizer,
    spec: PolicySpec,
    /// The token after which the network speaks.
    start: u32,
    begin: Vec<u32>,
    /// Tokens that end a sequence.
    ends: Vec<u32>,
    /// Text token of action token 0; the others lie below.
    first: usize,
    most_tokens: usize,
    run: Option<Run>,
}

impl PiFastPolicy {
    /// Builds the policy of `checkpoint`.
    ///
    /// # Errors
    /// [`ModelError`] naming what does not fit; [`ModelError::RateUnknown`] when neither checkpoint
    /// nor `options` give the action rate.
    pub fn load(checkpoint: &Checkpoint, options: &LoadOptions) -> Result<Self, ModelError> {
        let config = PiConfig::of(checkpoint)?;
        let preparer = Preparer::new(checkpoint, options.missing_cameras)?;
        let file = checkpoint.extra(super::ACTION_TOKENIZER)?;
        let settings = checkpoint.extra(super::ACTION_TOKENIZER_CONFIG)?;
        let tokenizer =
            FastTokenizer::new((&file.path, &file.text), (&settings.path, &settings.text))?;
        let model = PiFast::load(checkpoint)?;
        let prompter = preparer.prompter();
        let start = prompter.special("<bos>")?;
        let first = prompter.learned_tokens().checked_sub(1 + config.fast_skip_tokens);
        let first = first.filter(|f| *f < model.vocabulary() && *f + 1 >= tokenizer.vocabulary());
        let Some(first) = first else {
            let reason = format!(
                "has {} tokens, and the text's {} leave no room for them before the last {}",
                tokenizer.vocabulary(),
                prompter.learned_tokens(),
                config.fast_skip_tokens
            );
            return Err(ModelError::Tokenizer { path: file.path.clone(), reason });
        };
        // In training the end mark is encoded with a beginning of its own.
        let ends = vec![prompter.special(END)?, start];
        let begin = prompter.encode_plain(BEGIN)?;
        let steps = 1;
        let spec = preparer.boundary().spec(checkpoint, options, config.n_action_steps, steps)?;
        let most_tokens = config.max_decoding_steps.saturating_sub(begin.len()).max(1);
        Ok(Self {
            model,
            preparer,
            tokenizer,
            spec,
            start,
            begin,
            ends,
            first,
            most_tokens,
            run: None,
        })
    }

    /// The likeliest token that can come next: an action token, or none for the end.
    fn choose(&self, run: &Run, reading: &Reading) -> candle_core::Result<Option<usize>> {
        let count = self.tokenizer.vocabulary();
        let low = self.first + 1 - count;
        let logits = self.model.logits(reading, low..self.first + 1)?;
        let mut best: Option<(f32, Option<usize>)> = None;
        let mut offer = |logit: f32, choice| {
            if best.is_none_or(|(most, _)| logit > most) {
                best = Some((logit, choice));
            }
        };
        if run.coefficients.may_end() {
            for end in &self.ends {
                let end = *end as usize;
                for logit in self.model.logits(reading, end..end + 1)?.values() {
                    offer(*logit, None);
                }
            }
        }
        for id in (0..count).filter(|id| self.tokenizer.fits(&run.coefficients, *id)) {
            offer(logits.values()[count - 1 - id], Some(id));
        }
        Ok(best.and_then(|(_, choice)| choice))
    }
}

impl Policy for PiFastPolicy {
    fn spec(&self) -> &PolicySpec {
        &self.spec
    }

    fn begin(
        &mut self,
        observation: &Observation,
        request: &ChunkRequest,
    ) -> Result<(), PolicyError> {
        self.run = None;
        let start = Instant::now();
        if request.prefix.is_some() {
            return Err(PolicyError::Unsupported("planned actions"));
        }
        let inputs = self.preparer.prepare(observation)?;
        self.run = Some(Run {
            ticket: Ticket::prepared(request, observation, &STAGES, start),
            inputs,
            images: Vec::new(),
            reading: None,
            coefficients: self.tokenizer.begin(self.spec.action_horizon, self.spec.action_dim),
            said: 0,
            done: false,
        });
        Ok(())
    }

    fn advance(&mut self) -> Result<Progress, PolicyError> {
        // Taken out and put back: choosing a token reads the whole policy.
        let mut run = self.run.take().ok_or(NOT_BEGUN)?;
        if run.done {
            self.run = Some(run);
            return Ok(Progress::Done);
        }
        let start = Instant::now();
        let stage = self.step(&mut run).map_err(compute)?;
        run.ticket.add(stage, start);
        let progress = if run.done {
            Progress::Done
        } else {
            Progress::Step {
                stage: STAGES[stage],
                done: run.images.len() + usize::from(run.reading.is_some()) + run.said,
                total: run.inputs.pixels.len() + 1 + self.most_tokens,
                denoised: false,
                next_denoises: false,
            }
        };
        self.run = Some(run);
        Ok(progress)
    }

    fn take_chunk(&mut self) -> Result<ActionChunk, PolicyError> {
        let run = self.run.take_if(|run| run.done).ok_or(NOT_DONE)?;
        if run.coefficients.values().is_empty() {
            let reason = "no action token could be decoded; the checkpoint's action tokenizer is \
                          not the one that it was trained with";
            return Err(PolicyError::Compute(reason.into()));
        }
        let dim = self.spec.action_dim;
        let rows = self.tokenizer.actions(&run.coefficients, dim);
        let boundary = self.preparer.boundary();
        let actions = boundary.actions_from(&run.inputs.origin, rows.chunks_exact(dim))?;
        run.ticket.chunk(&self.spec, actions, 0)
    }

    /// Ends with the frequencies decoded so far, once every dimension has its mean.
    fn finish_early(&mut self) -> Result<bool, PolicyError> {
        let dim = self.spec.action_dim;
        let run = self.run.as_mut().ok_or(NOTHING_BEGUN)?;
        run.done |= run.coefficients.values().len() >= dim;
        Ok(run.done)
    }
}

impl PiFastPolicy {
    /// One bounded step; its stage.
    fn step(&self, run: &mut Run) -> candle_core::Result<usize> {
        if let Some(pixels) = run.inputs.pixels.get(run.images.len()) {
            run.images.push(Arc::new(self.model.encode_image(pixels)?.tokens));
            return Ok(VISION);
        }
        let Some(reading) = &run.reading else {
            let prompt = &run.inputs.tokens;
            let embeddings = self.model.embed_prefix(&run.images, prompt, self.start)?;
            let reading = self.model.prefill(embeddings)?;
            run.reading = Some(match self.begin.as_slice() {
                [] => reading,
                begin => self.model.read(&reading, begin)?,
            });
            return Ok(PREFIX);
        };
        let choice = self.choose(run, reading)?;
        let said = choice.is_some_and(|id| self.tokenizer.push(&mut run.coefficients, id));
        run.said += usize::from(said);
        run.done = !said || run.coefficients.is_complete() || run.said >= self.most_tokens;
        if let (Some(id), false) = (choice, run.done) {
            // `first` was checked to be at least every action token.
            run.reading = Some(self.model.read(reading, &[(self.first - id) as u32])?);
        }
        Ok(TOKENS)
    }
}
