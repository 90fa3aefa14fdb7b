use std::path::PathBuf;
use std::sync::Arc;

use anchor::{Anchor, Compute, Gradients, Targets};
use corpus::{Batch, Corpus};
use generate::Model;
use memory_bank::{Block, BlockStore, Blocking, Step, squared_norm};
use rayon::prelude::*;

use crate::checkpoint::{Checkpoints, TrainState, write_whole};
use crate::loader::Loader;
use crate::metrics::{Laps, Metrics, StepMetrics, StepTime};
use crate::optimizer::{Optimizer, gradient_norm};
use crate::{Error, Result, TrainConfig};

/// What a trainer is made of.
pub struct Parts<S> {
    /// Where metrics and checkpoints go.
    pub run_dir: PathBuf,
    /// How to train.
    pub config: TrainConfig,
    /// Packed sequences.
    pub corpus: Arc<Corpus>,
    /// The model at the beginning; frozen when the phase says so.
    pub anchor: Anchor,
    /// The bank, in phases with memory.
    pub memory: Option<Blocking<S>>,
}

impl<S> Parts<S> {
    /// Fails on a configuration that cannot be trained with, and on a bank too many or too few.
    fn check(&self) -> Result<()> {
        self.config.check()?;
        let (phase, has_bank) = (self.config.phase, self.memory.is_some());
        if phase.has_memory() == has_bank {
            return Ok(());
        }
        let found = format!("{phase:?} {} a bank", if has_bank { "with" } else { "without" });
        Err(Error::Config {
            key: "phase",
            expected: "a phase with memory and a bank, or neither".into(),
            found,
        })
    }
}

/// The training loop and its state.
pub struct Trainer<S> {
    run_dir: PathBuf,
    config: TrainConfig,
    corpus: Arc<Corpus>,
    anchor: Anchor,
    memory: Option<Blocking<S>>,
    /// None when the anchor is frozen.
    optimizer: Option<Optimizer>,
    /// Of the anchor, in the last step.
    gradients: Gradients,
    checkpoints: Checkpoints,
    state: TrainState,
    last_loss: f64,
}

impl<S: BlockStore> Trainer<S> {
    /// A run that begins at step 0, from an anchor trained on `tokens_before` targets already.
    ///
    /// # Errors
    /// When the configuration cannot be trained with, or its phase has memory and there is no bank (or the
    /// other way round).
    pub fn new(parts: Parts<S>, tokens_before: u64) -> Result<Self> {
        parts.check()?;
        let optimizer = match parts.config.phase.trains_anchor() {
            true => Some(Optimizer::new(&parts.anchor)?),
            false => None,
        };
        Ok(Self::with(parts, optimizer, TrainState { tokens_before, ..TrainState::default() }))
    }

    /// A run that continues from its checkpoint of `step`; `parts.anchor` and the bank are those of it.
    ///
    /// # Errors
    /// When the checkpoint lacks a file or was made for another anchor.
    pub fn resume(parts: Parts<S>, step: u64) -> Result<Self> {
        parts.check()?;
        let checkpoints = Checkpoints::of(&parts.run_dir);
        let state = checkpoints.state(step)?;
        let optimizer = match parts.config.phase.trains_anchor() {
            true => {
                let path = checkpoints.dir(step).join("optimizer.safetensors");
                Some(Optimizer::load(&path, &parts.anchor)?)
            }
            false => None,
        };
        Ok(Self::with(parts, optimizer, state))
    }

    fn with(parts: Parts<S>, optimizer: Option<Optimizer>, state: TrainState) -> Self {
        let Parts { run_dir, config, corpus, anchor, memory } = parts;
        let checkpoints = Checkpoints::of(&run_dir);
        let anchor = if config.phase.trains_anchor() { anchor } else { anchor.freeze() };
        Self {
            run_dir,
            config,
            corpus,
            anchor,
            memory,
            optimizer,
            gradients: Gradients::default(),
            checkpoints,
            state,
            last_loss: f64::NAN,
        }
    }

    /// Steps, tokens and sequences so far.
    pub fn state(&self) -> TrainState {
        self.state
    }

    /// The model as trained so far.
    pub fn anchor(&self) -> &Anchor {
        &self.anchor
    }

    /// Trains to the last step, saving on the way; `progress` sees every step.
    ///
    /// # Errors
    /// When the loss diverges, or data, bank or files fail; the last whole checkpoint stays.
    pub fn run(&mut self, progress: &mut dyn FnMut(&StepMetrics)) -> Result<()> {
        let mut metrics = Metrics::resume(&self.run_dir, self.state.step, self.state.tokens_seen)?;
        let loader = Loader::start(self.corpus.clone(), &self.config, self.state.step + 1);
        while self.state.step < self.config.steps {
            let step = self.state.step + 1;
            let mut laps = Laps::start();
            let batch = loader.next(step)?;
            let data_ms = laps.lap_ms();
            let mut line = self.step(&batch)?;
            line.time.data_ms = data_ms;
            let last = step == self.config.steps;
            let saves = last || due(step, self.config.save_every);
            if saves {
                self.check_update(&batch)?;
            }
            if last || due(step, self.config.validate_every) {
                line.validation_loss = self.validation_loss()?;
            }
            if last || line.validation_loss.is_some() || due(step, self.config.log_every) {
                line = metrics.write(line)?;
            }
            progress(&line);
            if saves {
                self.save()?;
            }
        }
        Ok(())
    }

    /// One optimizer step on `batch`.
    ///
    /// # Errors
    /// When the loss or the gradient is not finite; then nothing was applied.
    pub fn step(&mut self, batch: &Batch) -> Result<StepMetrics> {
        let step = self.state.step + 1;
        let (mut laps, mut time) = (Laps::start(), StepTime::default());
        let blocks = self.model().fetch(&batch.paths)?;
        time.fetch_ms = laps.lap_ms();
        let (loss, block_gradients) = self.backward(batch, &blocks)?;
        time.compute_ms = laps.lap_ms();
        self.check_finite(step, "loss", loss)?;
        let norm = match self.optimizer {
            Some(_) => ops::on_pool(|| gradient_norm(&self.anchor, &self.gradients))?,
            None => 0.0,
        };
        self.check_finite(step, "gradient norm", norm)?;
        let memory_norm = block_norm(&block_gradients);
        self.check_finite(step, "memory gradient norm", memory_norm)?;
        if let Some(memory) = &self.memory {
            memory.push(Step(step), 0, block_gradients)?;
        }
        time.push_ms = laps.lap_ms();
        if let Some(optimizer) = &mut self.optimizer {
            let clip = self.config.clip;
            let scale = if clip > 0.0 && norm > clip { clip / norm } else { 1.0 };
            let (anchor, gradients) = (&self.anchor, &self.gradients);
            ops::on_pool(|| optimizer.step(anchor, gradients, (&self.config, step, scale)))?;
        }
        time.update_ms = laps.lap_ms();
        self.last_loss = loss;
        self.state =
            TrainState { step, tokens_seen: self.state.tokens_seen + batch.n_scored() as u64, ..self.state };
        let has_memory = self.memory.is_some();
        Ok(StepMetrics {
            step,
            loss,
            learning_rate: self.config.schedule().at(step),
            gradient_norm: norm,
            memory_learning_rate: if has_memory { self.config.memory_adamw().schedule.at(step) } else { 0.0 },
            memory_gradient_norm: memory_norm,
            n_blocks: blocks.len(),
            tokens_seen: self.state.tokens_seen,
            time,
            ..StepMetrics::default()
        })
    }

    /// Loss of a batch and the gradients of its blocks, in micro-batches whose gradients are summed; those of
    /// the anchor are left in `self.gradients`.
    fn backward(&mut self, batch: &Batch, blocks: &[Block]) -> Result<(f64, Vec<Block>)> {
        let scale = 1.0 / batch.n_scored() as f64;
        let (mut loss, mut block_gradients) = (0.0, vec![]);
        let compute =
            Compute { precision: self.config.precision, checkpoint: self.config.checkpoint_activations };
        self.gradients.clear();
        for part in batch.split(self.config.micro_batch) {
            let memory = self.model().place(blocks, &part.paths)?;
            let targets = Targets { targets: &part.targets, scale, z_loss: self.config.z_loss };
            let work = (eval::input(&part), targets);
            let (part_loss, part_gradients) =
                self.anchor.loss_and_gradients(work, &memory, compute, &mut self.gradients)?;
            loss += part_loss;
            add_blocks(&mut block_gradients, part_gradients);
        }
        Ok((loss, block_gradients))
    }

    fn check_finite(&self, step: u64, what: &'static str, found: f64) -> Result<()> {
        if found.is_finite() {
            return Ok(());
        }
        Err(Error::Diverged { step, what, found, last_loss: self.last_loss })
    }

    /// Fails when the model as the last step left it has no finite loss, so that every checkpoint can be
    /// gone on with.
    fn check_update(&self, batch: &Batch) -> Result<()> {
        let Some(part) = batch.split(self.config.micro_batch).next() else { return Ok(()) };
        let model = self.model();
        let memory = model.place(&model.fetch(&part.paths)?, &part.paths)?;
        let targets = Targets { targets: &part.targets, scale: 1.0, z_loss: 0.0 };
        let (_, losses) = self.anchor.loss(eval::input(&part), targets, &memory)?;
        let loss: f64 = losses.into_iter().map(f64::from).sum();
        self.check_finite(self.state.step, "loss after the update", loss)
    }

    /// Mean loss on some held-out sequences, with the memory that they were trained to fetch.
    fn validation_loss(&self) -> Result<Option<f64>> {
        let n = match self.config.validate_sequences {
            0 => self.corpus.n_validation(),
            n => n.min(self.corpus.n_validation()),
        };
        if n == 0 {
            return Ok(None);
        }
        let memory = match (&self.memory, self.config.assign) {
            (None, _) => eval::MemoryMode::None,
            (Some(_), crate::Assign::AlwaysOn) => eval::MemoryMode::Generic,
            (Some(_), crate::Assign::Fetched) => eval::MemoryMode::Fetched,
        };
        let held_out =
            eval::held_out(&self.model(), &self.corpus, memory, (n, self.config.micro_batch), &[])?;
        let loss = held_out.total.mean();
        self.check_finite(self.state.step, "held-out loss", loss)?;
        Ok(Some(loss))
    }

    /// The model after the last step.
    fn model(&self) -> Model<'_, S> {
        Model { anchor: &self.anchor, bank: self.memory.as_ref(), step: Step(self.state.step) }
    }

    /// Writes a whole checkpoint of the current step, DONE last.
    ///
    /// # Errors
    /// When a file cannot be written; the checkpoints before stay whole.
    pub fn save(&self) -> Result<()> {
        let step = self.state.step;
        let dir = self.checkpoints.begin(step)?;
        self.anchor.save(&dir.join("anchor.safetensors"))?;
        if let Some(optimizer) = &self.optimizer {
            optimizer.save(&dir.join("optimizer.safetensors"))?;
        }
        if let Some(memory) = &self.memory {
            memory.save(Step(step))?;
        }
        let path = dir.join("state.json");
        let state = serde_json::to_string_pretty(&self.state).map_err(|e| Error::file(&path, e))?;
        write_whole(&path, state.as_bytes())?;
        self.checkpoints.finish(step, self.config.keep)
    }
}

fn due(step: u64, every: u64) -> bool {
    every > 0 && step.is_multiple_of(every)
}

/// Sums the gradients of blocks that several micro-batches share.
fn add_blocks(total: &mut Vec<Block>, part: Vec<Block>) {
    for block in part {
        match total.iter_mut().find(|sum| sum.id == block.id) {
            Some(sum) => sum.values.iter_mut().zip(block.values).for_each(|(sum, x)| *sum += x),
            None => total.push(block),
        }
    }
}

fn block_norm(blocks: &[Block]) -> f64 {
    // Summed in order, whatever the threads; `sum` of nothing is -0.
    let squares: Vec<f64> = blocks.par_iter().map(|block| squared_norm(&block.values)).collect();
    squares.into_iter().fold(0.0, |sum, x| sum + x).sqrt()
}
