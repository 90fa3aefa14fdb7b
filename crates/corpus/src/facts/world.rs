//! The entities: who exists, what is true of them, how often they are told.

use rand::seq::{IndexedRandom, SliceRandom};
use rand_chacha::ChaCha8Rng;

use super::catalog::Catalog;
use super::options::N_BUCKETS;
use super::{Entity, Fact, Kind, Options, Stream, draw};

/// All entities: elements, countries, then family by family. Exposures are zero until documents
/// are dealt. `options` have been checked against `catalog`.
pub(super) fn build(options: &Options, catalog: &Catalog) -> Vec<Entity> {
    let mut entities = Vec::new();
    for real in &catalog.real {
        let relations = &catalog.kind(real.kind).relations;
        let facts = real.facts.iter().map(|(index, value)| Fact {
            relation: relations[*index].name.clone(),
            relation_index: *index,
            value: value.clone(),
            exposures: 0,
        });
        entities.push(entity(real.kind, real.name.clone(), None, facts.collect()));
    }
    let mut values = Stream::Values.rng(options.seed);
    for (kind, name, family) in fictional_names(options, catalog) {
        entities.push(entity(kind, name, Some(family), draw_facts(catalog, kind, &mut values)));
    }
    assign_buckets(options, &mut entities);
    entities
}

fn entity(kind: Kind, name: String, family: Option<usize>, facts: Vec<Fact>) -> Entity {
    Entity { kind, name, family, bucket: 0, documents: 0, facts }
}

fn fictional_names(options: &Options, catalog: &Catalog) -> Vec<(Kind, String, usize)> {
    let mut rng = Stream::Names.rng(options.seed);
    let names = &catalog.names;
    let roots = names.roots(options.families, &mut rng);
    let mut out = Vec::new();
    for (family, root) in roots.iter().enumerate() {
        let person = |given: &str| (Kind::Person, format!("{given} {root}"), family);
        out.extend(draw(&names.given, options.people_per_family, &mut rng).into_iter().map(person));
        let company = |suffix: &str| (Kind::Company, format!("{root} {suffix}"), family);
        out.extend(draw(&names.company, options.companies_per_family, &mut rng).into_iter().map(company));
        let place = |pattern: &str| (Kind::Place, pattern.replace("{}", root), family);
        out.extend(draw(&names.place, options.places_per_family, &mut rng).into_iter().map(place));
    }
    out
}

/// One value for each relation of `kind`, each an independent uniform draw.
fn draw_facts(catalog: &Catalog, kind: Kind, rng: &mut ChaCha8Rng) -> Vec<Fact> {
    let relations = catalog.kind(kind).relations.iter().enumerate();
    relations
        .filter_map(|(relation_index, relation)| {
            // A closed list is never empty: the catalog has checked its length.
            let value = relation.pool.choose(rng)?.clone();
            Some(Fact { relation: relation.name.clone(), relation_index, value, exposures: 0 })
        })
        .collect()
}

/// Deals the buckets over all entities alike, so that rare and frequent ones share families.
fn assign_buckets(options: &Options, entities: &mut [Entity]) {
    let sizes = bucket_sizes(&options.shares, entities.len());
    let mut buckets: Vec<usize> = (0..N_BUCKETS).flat_map(|i| std::iter::repeat_n(i, sizes[i])).collect();
    buckets.shuffle(&mut Stream::Buckets.rng(options.seed));
    for (entity, bucket_index) in entities.iter_mut().zip(buckets) {
        entity.bucket = bucket_index + 1;
        entity.documents = options.ladder[bucket_index];
    }
}

/// `n` split by `shares`, which sum to 1: floors first, then one more each by largest remainder.
pub(super) fn bucket_sizes(shares: &[f64; N_BUCKETS], n: usize) -> [usize; N_BUCKETS] {
    let exact = shares.map(|share| share * n as f64);
    let mut sizes = exact.map(|size| size as usize);
    let mut order: Vec<usize> = (0..N_BUCKETS).collect();
    order.sort_by(|&a, &b| exact[b].fract().total_cmp(&exact[a].fract()));
    let left = n.saturating_sub(sizes.iter().sum());
    order.into_iter().cycle().take(left).for_each(|i| sizes[i] += 1);
    sizes
}

#[cfg(test)]
mod tests {
    use super::bucket_sizes;

    #[test]
    fn sizes_add_up_by_largest_remainder() {
        let shares = [0.36, 0.26, 0.18, 0.12, 0.08];
        assert_eq!(bucket_sizes(&shares, 100), [36, 26, 18, 12, 8]);
        // 7.2, 5.2, 3.6, 2.4, 1.6: the two largest remainders get one more each.
        assert_eq!(bucket_sizes(&shares, 20), [7, 5, 4, 2, 2]);
        assert_eq!(bucket_sizes(&shares, 0), [0; 5]);
        for n in 0..2000 {
            assert_eq!(bucket_sizes(&shares, n).iter().sum::<usize>(), n);
        }
    }
}
