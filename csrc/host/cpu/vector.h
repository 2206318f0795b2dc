// Loops over one row of numbers, compiled for several instruction sets and chosen when the library is loaded.
#pragma once

#include <cstdint>

namespace nsa::cpu {

// The largest of n >= 1 numbers; NaN entries are passed over.
float row_max(const float* x, int64_t n);
double row_max(const double* x, int64_t n);

// x = exp(x - shift); returns the sum.
float row_exp(float* x, int64_t n, float shift);
double row_exp(double* x, int64_t n, double shift);

// x *= factor
void row_scale(float* x, int64_t n, float factor);
void row_scale(double* x, int64_t n, double factor);

// y = y * factor + x
void row_scale_add(float* y, const float* x, int64_t n, float factor);
void row_scale_add(double* y, const double* x, int64_t n, double factor);

// y += x
void row_add(float* y, const float* x, int64_t n);
void row_add(double* y, const double* x, int64_t n);

// sum of x * y
float row_dot(const float* x, const float* y, int64_t n);
double row_dot(const double* x, const double* y, int64_t n);

// Backward of softmax: dp = p * (dp - delta). An entry whose p is 1 but for rounding is its row's only one: there dp
// and delta less grad_lse are one number, and grad_lse is taken in place of the difference of their roundings.
void row_softmax_backward(float* dp, const float* p, int64_t n, float delta, float grad_lse);
void row_softmax_backward(double* dp, const double* p, int64_t n, double delta, double grad_lse);

}  // namespace nsa::cpu
