package sync

import (
	"github.com/prometheus/client_golang/prometheus"
)

// Metrics are those that both duties feed.
type Metrics struct {
	secretWrites *prometheus.CounterVec
}

// NewMetrics registers the metrics.
func NewMetrics(registry prometheus.Registerer) *Metrics {
	m := &Metrics{
		secretWrites: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "imps_secret_writes_total",
			Help: "Writes of target Secrets, by duty, verb (create, update, adopt, delete) and result (ok, or the class of the error).",
		}, []string{"duty", "verb", "result"}),
	}
	registry.MustRegister(m.secretWrites)
	return m
}

// SecretWrite counts one write of a target Secret.
func (m *Metrics) SecretWrite(duty, verb string, err error) {
	m.secretWrites.WithLabelValues(duty, verb, ResultOf(err)).Inc()
}

// ResultOf is the result of a write as metrics have it: ok, or the class of the error.
func ResultOf(err error) string {
	if err == nil {
		return "ok"
	}
	return ClassifyError(err).String()
}
