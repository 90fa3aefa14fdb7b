use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anchor::{Anchor, Compute, Gradients, Targets};
use collective::{Call, TreeSum};
use corpus::{Batch, Corpus};
use generate::Model;
use memory_bank::{Block, BlockStore, Blocking, Step};

use crate::attempt::Attempt;
use crate::buckets::{BUCKET, Buckets};
use crate::checkpoint::{Checkpoints, TrainState};
use crate::loader::Loader;
use crate::metrics::{Laps, Metrics, StepMetrics, StepTime};
use crate::optimizer::{Optimizer, gradient_norm};
use crate::pipe::MemoryPipe;
use crate::share::{Share, Sums};
use crate::{Ended, Error, Parts, Result, Subtree, TrainConfig, Workers, validation};

/// The training loop and its state.
pub struct Trainer<S> {
    attempt: Attempt,
    config: TrainConfig,
    corpus: Arc<Corpus>,
    anchor: Anchor,
    memory: Option<MemoryPipe<S>>,
    workers: Workers,
    /// None when the anchor is frozen.
    optimizer: Option<Optimizer>,
    /// Of the anchor, in the last step.
    gradients: Gradients,
    state: TrainState,
    last_loss: f64,
    /// Whether a worker was told to stop, as all know since the last step.
    is_stopping: bool,
}

impl<S: BlockStore> Trainer<S> {
    /// A run that begins at step 0, from an anchor trained on `tokens_before` targets already.
    ///
    /// # Errors
    /// When the configuration cannot be trained with, or its phase has memory and there is no bank (or the
    /// other way round).
    pub fn new(parts: Parts<S>, tokens_before: u64) -> Result<Self> {
        Self::start(parts, |parts| {
            let optimizer = match parts.config.phase.trains_anchor() {
                true => Some(Optimizer::new(&parts.anchor)?),
                false => None,
            };
            Ok((optimizer, TrainState { tokens_before, ..TrainState::default() }))
        })
    }

    /// A run that continues from its checkpoint of `step`; `parts.anchor` and the bank are those of it.
    ///
    /// # Errors
    /// When the checkpoint lacks a file or was made for another anchor.
    pub fn resume(parts: Parts<S>, step: u64) -> Result<Self> {
        Self::start(parts, |parts| {
            let checkpoints = Checkpoints::of(parts.attempt.run_dir());
            let state = checkpoints.state(step)?;
            let optimizer = match parts.config.phase.trains_anchor() {
                true => {
                    let path = checkpoints.dir(step).join("optimizer.safetensors");
                    Some(Optimizer::load(&path, &parts.anchor)?)
                }
                false => None,
            };
            Ok((optimizer, state))
        })
    }

    /// The other workers learn of an error that keeps this one from beginning.
    fn start(
        mut parts: Parts<S>,
        begin: impl FnOnce(&Parts<S>) -> Result<(Option<Optimizer>, TrainState)>,
    ) -> Result<Self> {
        match parts.check().and_then(|()| begin(&parts)) {
            Ok((optimizer, state)) => Ok(Self::with(parts, optimizer, state)),
            Err(error) => {
                parts.workers.mesh.give_up(&error.to_string(), error.cause());
                Err(error)
            }
        }
    }

    fn with(parts: Parts<S>, optimizer: Option<Optimizer>, state: TrainState) -> Self {
        let Parts { attempt, config, corpus, anchor, memory, workers } = parts;
        let anchor = if config.phase.trains_anchor() { anchor } else { anchor.freeze() };
        let memory = memory.map(|bank| MemoryPipe::new(bank, config.staleness));
        Self {
            attempt,
            config,
            corpus,
            anchor,
            memory,
            workers,
            optimizer,
            gradients: Gradients::default(),
            state,
            last_loss: f64::NAN,
            is_stopping: false,
        }
    }

    /// Steps, tokens and sequences so far.
    pub fn state(&self) -> TrainState {
        self.state
    }

    /// The bank that it trains, in phases with memory.
    pub fn memory(&self) -> Option<&Blocking<S>> {
        self.memory.as_ref().map(MemoryPipe::bank)
    }

    /// The model as trained so far.
    pub fn anchor(&self) -> &Anchor {
        &self.anchor
    }

    /// Trains to the last step, saving on the way; `progress` sees every step. Of several workers the first
    /// writes the run's files.
    ///
    /// # Errors
    /// When the loss diverges, when data, bank or files fail, and when another worker does; the last whole
    /// checkpoint stays.
    pub fn run(&mut self, progress: &mut dyn FnMut(&StepMetrics)) -> Result<Ended> {
        let done = self.run_steps(progress);
        if let Err(error) = &done {
            self.workers.mesh.give_up(&error.to_string(), error.cause());
        }
        done
    }

    fn run_steps(&mut self, progress: &mut dyn FnMut(&StepMetrics)) -> Result<Ended> {
        let mut metrics = match self.workers.mesh.rank() {
            0 => {
                self.attempt.check()?;
                let TrainState { step, tokens_seen, .. } = self.state;
                Some(Metrics::resume(self.attempt.run_dir(), step, tokens_seen)?)
            }
            _ => None,
        };
        let loader = Loader::start(self.corpus.clone(), &self.config, self.state.step + 1);
        let mut next = None;
        while self.state.step < self.config.steps {
            let step = self.state.step + 1;
            let mut laps = Laps::start();
            let (batch, share) = match next.take() {
                Some(work) => work,
                None => self.shared(loader.next(step)?),
            };
            if step < self.config.steps {
                next = Some(self.shared(loader.next(step + 1)?));
            }
            let data_ms = laps.lap_ms();
            let mut line = self.step_before((&batch, &share), next.as_ref())?;
            line.time.data_ms = data_ms;
            let last = step == self.config.steps;
            let saves = metrics.is_some() && (last || self.is_stopping || due(step, self.config.save_every));
            let validates = last || due(step, self.config.validate_every);
            if saves || validates {
                self.reach()?;
            }
            if saves {
                self.check_update(&batch)?;
            }
            if validates {
                line.validation_loss = self.validation_loss()?;
            }
            if let Some(metrics) = &mut metrics
                && (last || line.validation_loss.is_some() || due(step, self.config.log_every))
            {
                self.attempt.check()?;
                line.traffic = self.memory.as_ref().and_then(|memory| memory.bank().store().traffic());
                line = metrics.write(line)?;
            }
            progress(&line);
            if saves {
                self.save()?;
            }
            if self.is_stopping && !last {
                return self.settle(Ended::Stopped);
            }
        }
        self.settle(Ended::Done)
    }

    /// Waits until the bank has the last step of all workers.
    fn reach(&mut self) -> Result<()> {
        let step = self.state.step;
        match &mut self.memory {
            Some(memory) => memory.reach(step, minding(&mut self.workers, step)),
            None => Ok(()),
        }
    }

    /// Waits for the gradients that are on their way, and for all workers: the first one saves last.
    fn settle(&mut self, ended: Ended) -> Result<Ended> {
        let step = self.state.step;
        if let Some(memory) = &mut self.memory {
            memory.settle(minding(&mut self.workers, step))?;
        }
        self.workers.mesh.barrier(&Call::new("end", step))?;
        Ok(ended)
    }

    /// One optimizer step on `batch`, which all workers share.
    ///
    /// # Errors
    /// When the loss or the gradient is not finite, and then nothing was applied; and when another worker
    /// fails.
    pub fn step(&mut self, batch: &Batch) -> Result<StepMetrics> {
        self.step_before((batch, &self.share(batch)), None)
    }

    /// A step, whose blocks may be on their way, and those of the next one from when that can be.
    fn step_before(
        &mut self,
        (batch, share): (&Batch, &Share),
        next: Option<&(Batch, Share)>,
    ) -> Result<StepMetrics> {
        let step = self.state.step + 1;
        let (mut laps, mut time) = (Laps::start(), StepTime::default());
        let mut blocks = vec![];
        if let Some(memory) = &mut self.memory {
            blocks = memory.blocks(step, || share.ids(batch), minding(&mut self.workers, step))?;
            if let Some((next, share)) = next.filter(|_| memory.staleness() > 0) {
                memory.begin_fetch(step + 1, || share.ids(next));
            }
        }
        time.fetch_ms = laps.lap_ms();
        let Sums { losses, anchor, blocks: block_sums } =
            self.backward((batch, share), &blocks, &mut time)?;
        laps.lap_ms();
        self.gradients = anchor;
        let Workers { mesh, replicated, stop, .. } = &mut self.workers;
        let (loss, is_stopping) = share.reduce_loss(mesh, step, &losses, stop.load(Ordering::Relaxed))?;
        let (block_gradients, memory_norm) = share.reduce_blocks(mesh, step, block_sums, replicated)?;
        // Of a subtree, gradients are those that it has in the whole step, and the loss is its own.
        let (n_scored, loss) = match self.config.subtree {
            None => (batch.n_scored(), loss),
            Some(subtree) => match batch.only(|path| subtree.has(path)).n_scored() {
                0 => (0, 0.0),
                n_scored => (n_scored, loss * batch.n_scored() as f64 / n_scored as f64),
            },
        };
        time.reduce_ms += laps.lap_ms();
        self.check_finite(step, "loss", loss)?;
        let norm = match self.optimizer {
            Some(_) => ops::on_pool(|| gradient_norm(&self.anchor, &self.gradients))?,
            None => 0.0,
        };
        self.check_finite(step, "gradient norm", norm)?;
        self.check_finite(step, "memory gradient norm", memory_norm)?;
        if let Some(memory) = &mut self.memory {
            let rank = self.workers.rank_at_bank;
            memory.push(step, rank, block_gradients, minding(&mut self.workers, step))?;
            if let Some((next, share)) = next {
                memory.begin_fetch(step + 1, || share.ids(next));
            }
        }
        time.push_ms = laps.lap_ms();
        if let Some(optimizer) = &mut self.optimizer {
            let clip = self.config.clip;
            let scale = if clip > 0.0 && norm > clip { clip / norm } else { 1.0 };
            let (anchor, gradients) = (&self.anchor, &self.gradients);
            ops::on_pool(|| optimizer.step(anchor, gradients, (&self.config, step, scale)))?;
        }
        time.update_ms = laps.lap_ms();
        (self.last_loss, self.is_stopping) = (loss, is_stopping);
        self.state = TrainState { step, tokens_seen: self.state.tokens_seen + n_scored as u64, ..self.state };
        let has_memory = self.memory.is_some();
        Ok(StepMetrics {
            step,
            loss,
            learning_rate: self.config.schedule().at(step),
            gradient_norm: norm,
            memory_learning_rate: if has_memory { self.config.memory_adamw().schedule.at(step) } else { 0.0 },
            memory_gradient_norm: memory_norm,
            n_blocks: share.n_blocks(),
            tokens_seen: self.state.tokens_seen,
            time,
            ..StepMetrics::default()
        })
    }

    /// Who computes what of a batch.
    fn share(&self, batch: &Batch) -> Share {
        let spec = self.memory.as_ref().map(|memory| memory.bank().store().spec());
        let Workers { mesh, .. } = &self.workers;
        Share::new(batch, &self.config, spec, (mesh.rank(), mesh.world_size()))
    }

    fn shared(&self, batch: Batch) -> (Batch, Share) {
        let share = self.share(&batch);
        (batch, share)
    }

    /// Losses and gradients of this worker's micro-batches, each computed by itself and added up as all
    /// workers' are. Those of the anchor are summed over all workers behind the last micro-batch.
    fn backward(
        &mut self,
        (batch, share): (&Batch, &Share),
        blocks: &[Block],
        time: &mut StepTime,
    ) -> Result<Sums> {
        let mut laps = Laps::start();
        // The last step's, whose memory the forward pass needs.
        self.gradients.clear();
        let step = self.state.step + 1;
        let Self { config, anchor, memory, workers, .. } = self;
        let bank = memory.as_ref().map(MemoryPipe::bank);
        let (scale, z_loss) = (1.0 / batch.n_scored() as f64, config.z_loss);
        let compute = Compute { precision: config.precision, checkpoint: config.checkpoint_activations };
        let (mut losses, mut block_sums) = (vec![], BTreeMap::new());
        let mut run = |leaf: usize, part: &Batch, gradients: &mut Gradients| {
            if part.n_sequences() == 0 {
                losses.push(0.0);
                return Ok(());
            }
            let memory = Model { anchor, bank, step: Step(step - 1) }.place(blocks, &part.paths)?;
            let work = (eval::input(part), Targets { targets: &part.targets, scale, z_loss });
            let (loss, part_gradients) = anchor.loss_and_gradients(work, &memory, compute, gradients)?;
            losses.push(loss);
            for Block { id, values } in part_gradients {
                let sum: &mut TreeSum<Vec<f32>> = block_sums.entry(id).or_insert_with(|| share.sum());
                sum.push_array(leaf..leaf + 1, values);
            }
            Ok::<_, Error>(())
        };
        let is_shared = self.optimizer.is_some() && workers.mesh.world_size() > 1;
        let last = share.leaves().end - 1;
        let (mut sum, mut failed, mut total) = (share.sum(), Ok(()), Gradients::default());
        let parts = batch.split(config.micro_batch).enumerate();
        for (leaf, part) in parts.skip(share.leaves().start).take(share.leaves().len()) {
            let part = of_subtree(part, config.subtree);
            if is_shared && leaf == last {
                let before = std::mem::replace(&mut sum, share.sum()).into_parts();
                let buckets = Buckets {
                    mesh: &mut workers.mesh,
                    engine: &mut workers.engine,
                    call: Call::new("anchor gradients", step),
                    leaves: share.all_leaves(),
                    before,
                    n_parameters: anchor.parameters().len(),
                    size: BUCKET,
                };
                (total, (), time.reduce_ms) =
                    buckets.reduce_behind(|mut gradients| run(leaf, &part, &mut gradients))?;
            } else {
                let mut gradients = Gradients::default();
                run(leaf, &part, &mut gradients)?;
                sum.push(leaf..leaf + 1, gradients, |sum, gradients| add_to(sum, gradients, &mut failed));
            }
        }
        // Of one worker alone; the gradients of a frozen anchor are none.
        let own = sum.finish(|sum, gradients| add_to(sum, gradients, &mut failed));
        failed?;
        let anchor = own.into_iter().next().map_or(total, |(_, gradients)| gradients);
        let values =
            |parts: Vec<(Range<usize>, Vec<f32>)>| parts.into_iter().map(|(_, values)| values).collect();
        let blocks = block_sums.into_iter().map(|(id, sum)| (id, values(sum.finish_arrays()))).collect();
        time.compute_ms = laps.lap_ms() - time.reduce_ms;
        Ok(Sums { losses, anchor, blocks })
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
        let mut parts =
            batch.split(self.config.micro_batch).map(|part| of_subtree(part, self.config.subtree));
        let Some(part) = parts.find(|part| part.n_sequences() > 0) else { return Ok(()) };
        let model = self.model();
        let memory = model.place(&model.fetch(&part.paths)?, &part.paths)?;
        let targets = Targets { targets: &part.targets, scale: 1.0, z_loss: 0.0 };
        let (_, losses) = self.anchor.loss(eval::input(&part), targets, &memory)?;
        let loss: f64 = losses.into_iter().map(f64::from).sum();
        self.check_finite(self.state.step, "loss after the update", loss)
    }

    /// Mean loss on some held-out sequences, if there are any.
    fn validation_loss(&mut self) -> Result<Option<f64>> {
        if self.corpus.n_validation() == 0 {
            return Ok(None);
        }
        let (step, mesh) = (self.state.step, &self.workers.mesh);
        let part = (mesh.rank(), mesh.world_size());
        let mine = validation::losses(&self.model(), &self.corpus, &self.config, part)?;
        let total = validation::total(&mut self.workers.mesh, step, &mine)?;
        if total.tokens == 0 {
            return Ok(None);
        }
        let loss = total.mean();
        self.check_finite(step, "held-out loss", loss)?;
        Ok(Some(loss))
    }

    /// The model after the last step.
    fn model(&self) -> Model<'_, S> {
        Model {
            anchor: &self.anchor,
            bank: self.memory.as_ref().map(MemoryPipe::bank),
            step: Step(self.state.step),
        }
    }

    /// Writes a whole checkpoint of the current step, DONE last.
    ///
    /// # Errors
    /// When another attempt at the run has begun, and when a file cannot be written; the checkpoints before stay
    /// whole.
    pub fn save(&mut self) -> Result<()> {
        let step = self.state.step;
        self.reach()?;
        self.workers.mesh.at_work(|| {
            let dir = self.attempt.begin_save(step)?;
            let path = dir.join("anchor.safetensors");
            match &self.optimizer {
                None => save_frozen(&self.anchor, self.attempt.run_dir(), &path)?,
                Some(optimizer) => {
                    self.anchor.save(&path)?;
                    optimizer.save(&dir.join("optimizer.safetensors"))?;
                }
            }
            Ok::<_, Error>(())
        })?;
        // Shards publish what they save on their own.
        self.attempt.check()?;
        if let Some(memory) = &mut self.memory {
            memory.save(step, minding(&mut self.workers, step))?;
        }
        self.attempt.write_state(&self.state)?;
        self.workers.mesh.at_work(|| self.attempt.publish(step, self.config.keep))
    }
}

/// Writes an anchor that is not trained to `path`: the file of the checkpoint before, where a file can have two names.
fn save_frozen(anchor: &Anchor, run_dir: &Path, path: &Path) -> Result<()> {
    let checkpoints = Checkpoints::of(run_dir);
    let before = checkpoints.latest()?.map(|step| checkpoints.dir(step).join("anchor.safetensors"));
    match before {
        Some(before) if fs::hard_link(&before, path).is_ok() => Ok(()),
        _ => Ok(anchor.save(path)?),
    }
}

/// The part of a micro-batch that a run trains on; as wide as the whole, which decides no bit.
pub(crate) fn of_subtree(part: Batch, subtree: Option<Subtree>) -> Batch {
    match subtree {
        Some(subtree) => part.only(|path| subtree.has(path)),
        None => part,
    }
}

pub(crate) fn due(step: u64, every: u64) -> bool {
    every > 0 && step.is_multiple_of(every)
}

/// Asks whether the others are still there, while this worker waits for shards: what another has not pushed
/// never comes.
fn minding(workers: &mut Workers, step: u64) -> impl FnMut() -> Result<()> {
    move || Ok(workers.mesh.check(&Call::new("memory", step))?)
}

/// Adds the gradients of a micro-batch; what goes wrong is kept in `failed`.
fn add_to(sum: &mut Gradients, gradients: Gradients, failed: &mut candle_core::Result<()>) {
    if let Err(error) = ops::on_pool(|| sum.add(gradients)) {
        *failed = Err(error);
    }
}
