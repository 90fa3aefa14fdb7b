// Every kernel against a reference in double: values directly, gradients by central differences of a scalar that
// weighs each output differently.

#include "shim.h"

#include "kernels.cu"

#include <cstdio>
#include <string>

using Values = std::vector<double>;

// Values that repeat everywhere: a low-discrepancy sequence in (-scale, scale).
static Values values(size_t n, int seed, double scale = 0.9) {
  Values all(n);
  for (size_t i = 0; i < n; i++) {
    double x = (i + 1) * (seed * 2 + 1) * 0.61803398875;
    all[i] = (x - std::floor(x)) * 2 * scale - scale;
  }
  return all;
}

template <typename T> static std::vector<T> cast(const Values &from) {
  std::vector<T> to;
  for (double x : from) to.push_back(from_float<T>((float)x));
  return to;
}

template <typename T> static Values back(const std::vector<T> &from) {
  Values to;
  for (T x : from) to.push_back(to_float(x));
  return to;
}

// What the kernel sees: values of type T, as doubles again.
template <typename T> static Values seen(const Values &x) { return back(cast<T>(x)); }

template <typename T> constexpr double tolerance = std::is_same_v<T, float> ? 2e-5 : 2e-2;

template <typename T> static Values halved(const std::vector<T> &from) {
  Values to = back(from);
  for (double &x : to) x /= 2;
  return to;
}

static int failures = 0;

static void check(const std::string &name, const Values &found, const Values &expected, double tolerance) {
  double error = 0, size = 0;
  for (size_t i = 0; i < expected.size(); i++) {
    error += (found[i] - expected[i]) * (found[i] - expected[i]);
    size += expected[i] * expected[i];
  }
  error = std::sqrt(error) / (std::sqrt(size) + 0.05);
  bool ok = found.size() == expected.size() && error < tolerance;
  failures += !ok;
  std::printf("%-44s off by %.1e%s\n", name.c_str(), error, ok ? "" : "   FAILED");
}

// d/dx of sum(weights * f(x)) at some elements of x; `found` is compared at the same ones.
static void check_gradient(const std::string &name, const std::function<Values(const Values &)> &f, Values x,
                           const Values &weights, const Values &found, double tolerance) {
  Values some, expected;
  for (size_t i = 0; i < x.size(); i += std::max<size_t>(1, x.size() / 60)) {
    auto at = [&](double moved) {
      double before = x[i], sum = 0;
      x[i] = moved;
      Values y = f(x);
      x[i] = before;
      for (size_t j = 0; j < y.size(); j++) sum += y[j] * weights[j];
      return sum;
    };
    expected.push_back((at(x[i] + 1e-5) - at(x[i] - 1e-5)) / 2e-5);
    some.push_back(found[i]);
  }
  check(name, some, expected, tolerance);
}

template <typename T> static void check_norm(const std::string &type, bool rotated) {
  int n = 37, heads = 3, half = 8, d = heads * 2 * half, rows = 10, t = 19, first = 4;
  Values x = seen<T>(values(n * d, 1)), gain = seen<float>(values(d, 2)), dy = seen<T>(values(n * d, 3));
  std::vector<float> cos(32 * half), sin(32 * half);
  for (int i = 0; i < 32 * half; i++) cos[i] = std::cos(0.1 * i), sin[i] = std::sin(0.1 * i);
  Rotation rotation{cos.data(), sin.data(), rotated ? half : 0, t, first};
  double eps = 1e-5;
  auto f = [&](const Values &x, const Values &gain) {
    Values y(n * d);
    for (int row = 0; row < n; row++) {
      double squares = 0;
      for (int i = 0; i < d; i++) squares += x[row * d + i] * x[row * d + i];
      double r = 1 / std::sqrt(squares / d + eps);
      auto normed = [&](int i) { return x[row * d + i] * r * gain[i]; };
      for (int i = 0; i < d; i++) {
        int in_head = i % (2 * half), j = (first + row % t) * half + in_head % half;
        double turned = in_head < half ? normed(i) * cos[j] - normed(i + half) * sin[j]
                                       : normed(i) * cos[j] + normed(i - half) * sin[j];
        y[row * d + i] = rotated ? turned : normed(i);
      }
    }
    return y;
  };
  auto tx = cast<T>(x), tdy = cast<T>(dy);
  auto tgain = cast<float>(gain);
  std::vector<T> y(n * d), dx(n * d);
  launch({(unsigned)n, 1, 1}, 64, [&] { norm_forward(tx.data(), tgain.data(), y.data(), d, (float)eps, rotation); });
  std::string name = (rotated ? "norm and rope " : "norm ") + type;
  check(name, back(y), f(x, gain), tolerance<T>);
  int blocks = (n + rows - 1) / rows;
  std::vector<float> parts(blocks * d), dgain(d, 0.25f);
  launch({(unsigned)blocks, 1, 1}, 64, [&] {
    norm_backward(tx.data(), tgain.data(), tdy.data(), dx.data(), parts.data(), n, d, rows, (float)eps, false, rotation);
  });
  launch({1, 1, 1}, 64, [&] { sum_rows(parts.data(), dgain.data(), blocks, d, true); });
  for (float &g : dgain) g -= 0.25f;
  std::vector<T> twice = dx;
  launch({(unsigned)blocks, 1, 1}, 64, [&] {
    norm_backward(tx.data(), tgain.data(), tdy.data(), twice.data(), parts.data(), n, d, rows, (float)eps, true, rotation);
  });
  check(name + ": dx added", halved(twice), back(dx), tolerance<T>);
  check_gradient(name + ": dx", [&](const Values &x) { return f(x, gain); }, x, dy, back(dx), tolerance<T>);
  check_gradient(name + ": dgain", [&](const Values &g) { return f(x, g); }, gain, dy, back(dgain), tolerance<T>);
}

template <typename T> static void check_activation(const std::string &type) {
  int n = 13, r = 21;
  Values products = seen<T>(values(n * 2 * r, 1, 3)), dhidden = seen<T>(values(n * r, 2));
  auto f = [&](const Values &products) {
    Values hidden(n * r);
    for (int i = 0; i < n * r; i++) {
      double a = products[i / r * 2 * r + i % r], b = products[i / r * 2 * r + r + i % r];
      hidden[i] = a / (1 + std::exp(-a)) * b;
    }
    return hidden;
  };
  auto tp = cast<T>(products), th = std::vector<T>(n * r), td = cast<T>(dhidden);
  launch({5, 1, 1}, 64, [&] { activate(tp.data(), th.data(), (size_t)n, r); });
  check("activation " + type, back(th), f(products), tolerance<T>);
  launch({5, 1, 1}, 64, [&] { activate_backward(tp.data(), td.data(), (size_t)n, r); });
  check("activation again " + type, back(td), f(products), tolerance<T>);
  check_gradient("activation: gradient " + type, f, products, dhidden, back(tp), tolerance<T>);
}

template <typename T> static void check_cross_entropy(const std::string &type) {
  int m = 5, v = 101;
  double scale = 0.3, z = 0.01;
  Values logits = seen<float>(values(m * v, 1, 4));
  std::vector<unsigned> targets{3, 0xffffffffu, 100, 0, 50};
  auto f = [&](const Values &logits) {
    Values loss(m);
    for (int row = 0; row < m; row++) {
      if (targets[row] == 0xffffffffu) continue;
      double sum = 0;
      for (int i = 0; i < v; i++) sum += std::exp(logits[row * v + i]);
      loss[row] = std::log(sum) - logits[row * v + targets[row]] + z * std::log(sum) * std::log(sum);
    }
    return loss;
  };
  auto tl = cast<float>(logits);
  std::vector<T> gradient(m * v);
  std::vector<float> losses(2 * m);
  launch({(unsigned)m, 1, 1}, 64, [&] {
    cross_entropy(tl.data(), gradient.data(), targets.data(), losses.data(), v, (float)scale, (float)z);
  });
  Values with_z, plain, expected_plain;
  for (int row = 0; row < m; row++) {
    double sum = 0;
    for (int i = 0; i < v; i++) sum += std::exp(logits[row * v + i]);
    with_z.push_back(losses[2 * row + 1]);
    plain.push_back(losses[2 * row]);
    expected_plain.push_back(targets[row] == 0xffffffffu ? 0 : std::log(sum) - logits[row * v + targets[row]]);
  }
  check("cross-entropy " + type, with_z, f(logits), 2e-5);
  check("cross-entropy without z-loss " + type, plain, expected_plain, 2e-5);
  check_gradient("cross-entropy: gradient " + type, f, logits, Values(m, scale), back(gradient), tolerance<T>);
}

template <typename T> static void check_embedding(const std::string &type) {
  int d = 9;
  Values table = seen<float>(values(6 * d, 1)), dy = seen<T>(values(5 * d, 2));
  std::vector<unsigned> ids{4, 1, 4, 0, 4}, distinct{0, 1, 4}, first{0, 1, 2, 5}, order{3, 1, 0, 2, 4};
  Values expected, gradient(6 * d, 0.5);
  for (int i = 0; i < 5 * d; i++) {
    expected.push_back(table[ids[i / d] * d + i % d]);
    gradient[ids[i / d] * d + i % d] += dy[i];
  }
  auto tt = cast<float>(table);
  auto td = cast<T>(dy);
  std::vector<T> y(5 * d);
  std::vector<float> g(6 * d, 0.5f);
  launch({5, 1, 1}, 32, [&] { embed(tt.data(), ids.data(), y.data(), d); });
  launch({3, 1, 1}, 32, [&] { embed_backward(td.data(), distinct.data(), first.data(), order.data(), g.data(), d); });
  check("embedding " + type, back(y), expected, tolerance<T>);
  check("embedding: gradient " + type, back(g), gradient, tolerance<T>);
}

template <typename T> static void check_attention(const std::string &name, Attention a, const std::vector<unsigned> &starts, int batch) {
  a.starts = starts.data();
  int d = a.width(), nq = batch * a.queries * d, nk = batch * a.keys * d;
  Values q = seen<T>(values(nq, 1)), k = seen<T>(values(nk, 2)), v = seen<T>(values(nk, 3)), dy = seen<T>(values(nq, 4));
  auto f = [&](const Values &q, const Values &k, const Values &v) {
    Values y(nq);
    for (int b = 0; b < batch; b++)
      for (int h = 0; h < a.heads; h++)
        for (int t = 0; t < a.queries; t++) {
          const double *row = &q[(b * a.queries + t) * d + h * a.head_width];
          Values weights;
          double total = 0;
          int begin = starts[b * a.queries + t];
          for (int s = begin; s <= a.position(t); s++) {
            double score = 0;
            for (int i = 0; i < a.head_width; i++) score += row[i] * k[(b * a.keys + s) * d + h * a.head_width + i];
            weights.push_back(std::exp(score / std::sqrt(a.head_width)));
            total += weights.back();
          }
          for (size_t s = 0; s < weights.size(); s++)
            for (int i = 0; i < a.head_width; i++)
              y[(b * a.queries + t) * d + h * a.head_width + i] +=
                  weights[s] / total * v[(b * a.keys + begin + s) * d + h * a.head_width + i];
        }
    return y;
  };
  auto tq = cast<T>(q), tk = cast<T>(k), tv = cast<T>(v), tdy = cast<T>(dy);
  std::vector<T> y(nq), dq(nq), dk(nk), dv(nk);
  int rows = batch * a.heads * a.queries;
  std::vector<float> log_sum_exp(rows), delta(rows);
  auto tiles = [&](int n) { return Dim{(unsigned)((n + TILE - 1) / TILE), (unsigned)a.heads, (unsigned)batch}; };
  launch(tiles(a.queries), 32 * WARPS,
         [&] { attention_forward(tq.data(), tk.data(), tv.data(), y.data(), log_sum_exp.data(), a); });
  check(name, back(y), f(q, k, v), tolerance<T>);
  launch({(unsigned)((rows + WARPS - 1) / WARPS), 1, 1}, 32 * WARPS,
         [&] { attention_delta(y.data(), tdy.data(), delta.data(), a, rows); });
  launch(tiles(a.queries), 32 * WARPS, [&] {
    attention_backward_queries(tq.data(), tk.data(), tv.data(), tdy.data(), log_sum_exp.data(), delta.data(), dq.data(),
                               false, a);
  });
  launch(tiles(a.keys), 32 * WARPS, [&] {
    attention_backward_keys(tq.data(), tk.data(), tv.data(), tdy.data(), log_sum_exp.data(), delta.data(), dk.data(),
                            dv.data(), false, false, a);
  });
  auto dq2 = dq, dk2 = dk, dv2 = dv;
  launch(tiles(a.queries), 32 * WARPS, [&] {
    attention_backward_queries(tq.data(), tk.data(), tv.data(), tdy.data(), log_sum_exp.data(), delta.data(), dq2.data(),
                               true, a);
  });
  launch(tiles(a.keys), 32 * WARPS, [&] {
    attention_backward_keys(tq.data(), tk.data(), tv.data(), tdy.data(), log_sum_exp.data(), delta.data(), dk2.data(),
                            dv2.data(), true, true, a);
  });
  check(name + ": dq added", halved(dq2), back(dq), tolerance<T>);
  check(name + ": dk added", halved(dk2), back(dk), tolerance<T>);
  check(name + ": dv added", halved(dv2), back(dv), tolerance<T>);
  double limit = 2 * tolerance<T>;
  check_gradient(name + ": dq", [&](const Values &q) { return f(q, k, v); }, q, dy, back(dq), limit);
  check_gradient(name + ": dk", [&](const Values &k) { return f(q, k, v); }, k, dy, back(dk), limit);
  check_gradient(name + ": dv", [&](const Values &v) { return f(q, k, v); }, v, dy, back(dv), limit);
}

template <typename T> static void check_all(const std::string &type) {
  check_norm<T>(type, false);
  check_norm<T>(type, true);
  check_activation<T>(type);
  check_cross_entropy<T>(type);
  check_embedding<T>(type);
  check_attention<T>("attention " + type, {nullptr, 67, 67, 2, 16}, std::vector<unsigned>(67), 1);
  // Documents that begin at 0, 10, 64, 65 and 129, so that tiles see none, one or several of them.
  std::vector<unsigned> starts;
  for (unsigned t = 0; t < 140; t++) starts.push_back(t >= 129 ? 129 : t >= 65 ? 65 : t >= 64 ? 64 : t >= 10 ? 10 : 0);
  check_attention<T>("attention over documents " + type, {nullptr, 140, 140, 1, 32}, starts, 1);
  check_attention<T>("attention on earlier keys " + type, {nullptr, 3, 70, 2, 16}, {0, 2, 2, 66, 68, 69}, 2);
}

int main() {
  check_all<float>("f32");
  check_all<bf16>("bf16");
  size_t n = 1000;
  Values x = seen<float>(values(n, 1, 3));
  auto tx = cast<float>(x);
  std::vector<double> parts(2);
  double expected = 0;
  for (double value : x) expected += value * value;
  launch({2, 1, 1}, 256, [&] { squares(tx.data(), parts.data(), n); });
  check("squares", {parts[0] + parts[1]}, {expected}, 1e-6);
  auto p = cast<float>(values(n, 2)), g = cast<float>(values(n, 3)), m = cast<float>(values(n, 4)),
       v = cast<float>(values(n, 5));
  for (float &value : v) value = std::fabs(value);
  AdamW a{0.9f, 0.95f, 1e-8f, 0.5f, 0.999f, 0.01f, 1.5f};
  Values updated;
  for (size_t i = 0; i < n; i++) {
    double gradient = 0.5 * g[i], first = 0.9 * m[i] + 0.1 * gradient, second = 0.95 * v[i] + 0.05 * gradient * gradient;
    updated.push_back(p[i] * 0.999 - 0.01 * first / (std::sqrt(second * 1.5) + 1e-8));
  }
  launch({4, 1, 1}, 256, [&] { adamw(p.data(), g.data(), m.data(), v.data(), n, a); });
  check("adamw", back(p), updated, 1e-6);
  std::printf(failures ? "%d checks failed\n" : "all checks passed\n", failures);
  return failures ? 1 : 0;
}
