package ecr

import (
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Results of calls, as metrics tell them.
const (
	resultOK      = "ok"
	resultNone    = "none"    // there is nothing to be had, and that is well
	resultRefused = "refused" // somebody has to mend it
	resultFailed  = "failed"  // it may pass
)

// labels of every metric about a grant: the region or public.ecr.aws, and the role or the kind of identity.
var labels = []string{"registry", "identity"}

var (
	descExpiry = prometheus.NewDesc("imps_ecr_token_expiry_timestamp_seconds",
		"When the token expires that is in use, by the clock of AWS; of several grants with the same labels the first.", labels, nil)
	descFailures = prometheus.NewDesc("imps_ecr_failures_in_a_row",
		"How often ECR has failed to give a token since the last success; of several grants with the same labels the most.", labels, nil)
	descSuccess = prometheus.NewDesc("imps_ecr_last_success_timestamp_seconds",
		"When ECR last gave a token to this process, by the clock of AWS; of several grants with the same labels the earliest.", labels, nil)
	descSkew = prometheus.NewDesc("imps_ecr_clock_skew_seconds",
		"By how much the clock of AWS was ahead of the machine's at the last answer.", nil, nil)
)

func newMints() *prometheus.CounterVec {
	return prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "imps_ecr_mints_total", Help: "Tokens that were asked for, by result: ok, none (nothing to be had, which is well), refused (somebody has to mend it), failed (it may pass).",
	}, append(labels, "result"))
}

func resultOf(token Token, err error) string {
	switch {
	case errors.Is(err, ErrWait):
		return resultRefused
	case err != nil:
		return resultFailed
	case token.IsZero():
		return resultNone
	default:
		return resultOK
	}
}

// Describe implements prometheus.Collector.
func (t *Tokens) Describe(descs chan<- *prometheus.Desc) {
	t.mints.Describe(descs)
	for _, d := range []*prometheus.Desc{descExpiry, descFailures, descSuccess, descSkew} {
		descs <- d
	}
}

// Collect implements prometheus.Collector.
func (t *Tokens) Collect(metrics chan<- prometheus.Metric) {
	t.mints.Collect(metrics)
	type key struct{ registry, identity string }
	type worst struct {
		expiry, success time.Time
		failures        int
	}
	all := map[key]worst{}
	earlier := func(a, b time.Time) time.Time {
		if a.IsZero() || !b.IsZero() && b.Before(a) {
			return b
		}
		return a
	}
	t.mu.Lock()
	skew := t.skew
	for _, g := range t.grants {
		k := key{g.grant.String(), g.grant.Who()}
		w := all[k]
		w.expiry, w.success, w.failures = earlier(w.expiry, g.token.Expires), earlier(w.success, g.success), max(w.failures, g.failures)
		all[k] = w
	}
	t.mu.Unlock()
	gauge := func(desc *prometheus.Desc, value float64, labels ...string) {
		metrics <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value, labels...)
	}
	gauge(descSkew, skew.Seconds())
	for k, w := range all {
		gauge(descFailures, float64(w.failures), k.registry, k.identity)
		if !w.expiry.IsZero() {
			gauge(descExpiry, float64(w.expiry.Unix()), k.registry, k.identity)
		}
		if !w.success.IsZero() {
			gauge(descSuccess, float64(w.success.Unix()), k.registry, k.identity)
		}
	}
}
