// Arithmetic for host and device: running moments by Welford's update and Chan's merge.
//
// Neither function forms a sum of squares. The variance from such a sum suffers from cancellation if the mean
// is large against the standard deviation, as it is for the activation of a neuron over ordinary prompts.
#pragma once

#if defined(__CUDACC__)
#define NEMO_EXT_HOST_DEVICE __host__ __device__
#else
#define NEMO_EXT_HOST_DEVICE
#endif

namespace nemo_ext {

// Number of observations, their mean, and the sum of their squared deviations from that mean.
template <typename Real>
struct Moments {
  Real count = 0;
  Real mean = 0;
  Real m2 = 0;
};

// Welford, "Note on a method for calculating corrected sums of squares and products", 1962.
template <typename Real>
NEMO_EXT_HOST_DEVICE inline void welford_update(Moments<Real>& moments, Real observation) {
  moments.count += 1;
  const Real before = observation - moments.mean;
  moments.mean += before / moments.count;
  moments.m2 += before * (observation - moments.mean);
}

// Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
template <typename Real, typename Part>
NEMO_EXT_HOST_DEVICE inline void chan_merge(Moments<Real>& moments, const Moments<Part>& part) {
  if (part.count == 0) return;
  const Real total = moments.count + Real(part.count);
  const Real difference = Real(part.mean) - moments.mean;
  moments.mean += difference * (Real(part.count) / total);
  moments.m2 += Real(part.m2) + difference * difference * (moments.count * Real(part.count) / total);
  moments.count = total;
}

// The activations that enter the statistics are smaller than this (2⁵⁰). Squared deviations of larger ones
// could overflow in float32, and then m2 would stay infinite for good.
constexpr float kActivationLimit = 1125899906842624.0f;

// Whether an activation, which is not negative, can enter the statistics. NaN cannot.
NEMO_EXT_HOST_DEVICE inline bool enters_statistics(float activation) {
  return activation < kActivationLimit;
}

template <typename Integer, typename Divisor>
NEMO_EXT_HOST_DEVICE constexpr Integer ceil_divide(Integer dividend, Divisor divisor) {
  return (dividend + divisor - 1) / divisor;
}

}  // namespace nemo_ext
