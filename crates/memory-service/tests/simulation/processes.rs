//! A shard and a worker, as the simulation starts them.

use std::rc::Rc;
use std::sync::Arc;

use futures::stream;
use memory_bank::{BankStore, Block, BlockStore, Error, Live, Placement, Shard, Step, StoreOptions};
use memory_service::{
    Compression, Limits, RemoteBank, RemoteOptions, Retry, ServeOptions, Source, StoreOfBank,
    serve_connections,
};
use object_store::path::Path;
use rand::RngExt;
use tokio::task::JoinSet;
use tokio::time::sleep;
use turmoil::net::TcpListener;

use crate::launcher::{LOST, TICK, What, World};
use crate::network::{Accepted, channel};
use crate::setting::{BANK, dice, mix};

const PORT: u16 = 7070;

/// Serves a shard from the newest checkpoint for as long as it is let.
pub(crate) async fn shard(world: Rc<World>, shard: usize) -> turmoil::Result {
    loop {
        if let Err(error) = serve(&world, shard).await {
            // As when what it was reading has just been given up. A launcher would start it again.
            world.log(format_args!("shard {shard} does not start: {error}"));
        }
        sleep(TICK).await;
    }
}

pub(crate) async fn open_store(world: &World) -> memory_bank::Result<BankStore> {
    // Short chains and small parts, so that every way of writing is taken.
    let options = StoreOptions { max_chain: 3, part_bytes: 100_000, ..StoreOptions::default() };
    BankStore::open(world.object_store(), &Path::from("banks"), BANK, options).await
}

async fn serve(world: &Rc<World>, shard: usize) -> Result<(), Box<dyn std::error::Error>> {
    let setting = &world.setting;
    let placement = Placement { shard, n_shards: setting.n_shards };
    let (identity, options) = (setting.files_identity(), setting.shard_options(placement));
    let store = open_store(world).await?;
    let (value, base) = match store.latest().await? {
        Some(checkpoint) => (checkpoint.load(&identity, options).await?, checkpoint.record(placement)),
        None => (Shard::new(setting.spec.clone(), options)?, None),
    };
    let step = value.applied();
    let rows = value.snapshot(Step(0)).rows;
    let whole = world.reference.check_rows(step.0, &rows, |id| placement.owns(id));
    world.check(&format!("shard {shard} loaded"), whole);
    world.log(format_args!("shard {shard} serves from step {step}"));
    if step > Step(0) {
        world.count(What::Loaded, 1);
    }
    let listener = TcpListener::bind(("0.0.0.0", PORT)).await?;
    let incoming = stream::unfold(listener, async |listener| {
        let accepted = listener.accept().await;
        Some((accepted.map(|(tcp, _)| Accepted(tcp)), listener))
    });
    let serving = ServeOptions {
        identity: setting.identity(),
        limits: Limits { request_s: 6, idle_s: 2, ..Limits::default() },
        compression: Compression::None,
        tls: None,
        tokens: None,
        store: Some(StoreOfBank { store, identity, keep: 2, base }),
        bulk: None,
        http: None,
    };
    let source = Source::Live(Arc::new(Live::new(value)));
    Ok(serve_connections(source, incoming, serving, std::future::pending()).await?)
}

/// Trains, life after life.
pub(crate) async fn worker(world: Rc<World>, rank: usize) -> turmoil::Result {
    world.start(rank);
    loop {
        let life = world.life();
        let lived = tokio::select! {
            biased;
            () = world.over(life) => continue,
            lived = live(&world, rank, life) => lived,
        };
        match lived {
            Ok(()) => world.finish(rank),
            Err(error) => {
                let text = error.to_string();
                if text.contains(LOST) {
                    world.count(What::Lost, 1);
                } else if text.contains("was not applied within") {
                    world.count(What::TooLate, 1);
                }
                world.fail(life, &format!("rank {rank}: {text}"));
            }
        }
        world.over(life).await;
    }
}

async fn live(world: &Rc<World>, rank: usize, life: u64) -> Result<(), Error> {
    world.all_ready(rank).await;
    let bank = connect(world, rank, life).await?;
    let mut training = Training { stays: false, task: JoinSet::new() };
    // Cut off from who tells it that its life is over, it trains on beside those of the next one.
    training.stays = dice(world.setting.seed ^ life << 32 ^ rank as u64, "stays").random_bool(0.3);
    let (at, its) = (Rc::clone(world), bank.clone());
    training.task.spawn_local(async move { train(&at, (rank, life), &its).await });
    let done = end_save(&mut training.task).await;
    if bank.stats().unchanged_bytes > 0 {
        world.count(What::Unchanged, bank.stats().unchanged_bytes);
    }
    if bank.stats().retries > 0 {
        world.count(What::Retry, bank.stats().retries);
    }
    done
}

/// What is told of no end when it is dropped, if it stays.
struct Training {
    stays: bool,
    task: JoinSet<Result<(), Error>>,
}

impl Drop for Training {
    fn drop(&mut self) {
        if self.stays {
            self.task.detach_all();
        }
    }
}

pub(crate) async fn connect(world: &World, rank: usize, life: u64) -> Result<RemoteBank, Error> {
    let setting = &world.setting;
    let addresses = (0..setting.n_shards).map(|shard| format!("shard{shard}:{PORT}")).collect();
    let options = RemoteOptions {
        bulk: false,
        attempt: life,
        // Room for some of the blocks.
        cache_bytes: 8 << 10,
        connect_s: 1,
        retry: Retry { first_ms: 20, most_ms: 300, seconds: 10 },
        seed: mix(setting.seed ^ life << 8 ^ rank as u64),
        ..RemoteOptions::new(addresses, setting.spec.clone(), setting.identity())
    };
    RemoteBank::connect_over(options, channel).await
}

async fn train(world: &Rc<World>, (rank, life): (usize, u64), bank: &RemoteBank) -> Result<(), Error> {
    let setting = &world.setting;
    let name = format!("rank {rank} of life {life}");
    if rank == 0 {
        let step = roll_back(world, bank).await?;
        world.resume(life, step);
    }
    let Some(resumed) = world.resumed(life).await else { return Ok(()) };
    // Dropped with this function, which gives up the save.
    let mut saving = JoinSet::new();
    for step in resumed + 1..=setting.n_steps {
        let after = step.saturating_sub(1 + setting.staleness);
        let ids = setting.touched(step, rank);
        let keeps = dice(setting.seed ^ step << 32 ^ rank as u64, "keeps").random_bool(0.5);
        let fetched = match keeps {
            true => bank.read(Step(after), &ids).await?,
            false => bank.fetch(Step(after), &ids).await?,
        };
        check(world, &name, &fetched, after..=step - 1);
        let gradients = setting.gradients(step, rank, &fetched);
        bank.push(Step(step), rank, gradients.clone()).await?;
        world.log(format_args!("{name} pushed step {step}"));
        world.count(What::Push, 1);
        if dice(setting.seed ^ step << 32 ^ rank as u64, "repeat").random_bool(0.1) {
            bank.push(Step(step), rank, gradients).await?;
            world.count(What::Repeat, 1);
        }
        if rank == 0 && (step.is_multiple_of(setting.save_every) || step == setting.n_steps) {
            end_save(&mut saving).await?;
            let save = bank.begin_save(Step(step)).await?;
            world.log(format_args!("save of step {step} begins"));
            world.count(What::SaveBegun, 1);
            let world = Rc::clone(world);
            saving.spawn_local(async move {
                save.finish().await?;
                world.log(format_args!("saved step {step}"));
                world.count(What::Saved, 1);
                Ok(())
            });
        }
    }
    end_save(&mut saving).await?;
    let last = setting.n_steps;
    check(world, &name, &bank.fetch(Step(last), &setting.all_ids()).await?, last..=last);
    check(world, &name, &bank.read(Step(last), &setting.all_ids()).await?, last..=last);
    world.log(format_args!("{name} ends"));
    Ok(())
}

/// Has every shard go back to the newest checkpoint; makes the first one where there is none.
async fn roll_back(world: &World, bank: &RemoteBank) -> Result<u64, Error> {
    match bank.restore(None).await {
        Ok(step) => {
            world.log(format_args!("all go on from step {step}"));
            world.count(What::Restored, 1);
            Ok(step.0)
        }
        Err(error) if error.to_string().contains("holds no checkpoint") => {
            bank.save(Step(0)).await?;
            world.log("saved step 0");
            Ok(0)
        }
        Err(error) => Err(error),
    }
}

async fn end_save(saving: &mut JoinSet<Result<(), Error>>) -> Result<(), Error> {
    match saving.join_next().await {
        None => Ok(()),
        Some(ended) => ended.map_err(|source| Error::Task { source })?,
    }
}

fn check(world: &World, who: &str, fetched: &[Block], steps: std::ops::RangeInclusive<u64>) {
    for block in fetched {
        world.check(who, world.reference.check_block(block, steps.clone()));
    }
}
