package cluster

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	leader       prometheus.Gauge
	withoutAgent prometheus.Gauge
	namespaces   *prometheus.GaugeVec
	sources      *prometheus.GaugeVec
	attachments  *prometheus.CounterVec
	rescues      *prometheus.CounterVec
}

func newMetrics(registry prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		leader: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "imps_leader", Help: "1 where this process leads the cluster duty, else 0.",
		}),
		withoutAgent: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "imps_nodes_without_agent", Help: "Nodes that have no node report. Known to the leader only.",
		}),
		namespaces: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "imps_namespaces", Help: "Namespaces of an ImagePullSecret, by state: selected, delivered, excluded. Known to the leader only.",
		}, []string{"resource", "state"}),
		sources: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "imps_source_ok", Help: "1 where a source of an ImagePullSecret could be read, else 0. Known to the leader only.",
		}, []string{"resource", "source"}),
		attachments: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "imps_serviceaccount_writes_total", Help: "Writes of ServiceAccounts, by result (ok, or the class of the error).",
		}, []string{"result"}),
		rescues: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "imps_evictions_total", Help: "Evictions of Pods that could not pull, by result (ok, or the class of the error).",
		}, []string{"result"}),
	}
	for _, c := range []prometheus.Collector{m.leader, m.withoutAgent, m.namespaces, m.sources, m.attachments, m.rescues} {
		if err := registry.Register(c); err != nil {
			return nil, fmt.Errorf("metrics: %w", err)
		}
	}
	return m, nil
}

// reset forgets what only a leader knows.
func (m *metrics) reset() {
	m.withoutAgent.Set(0)
	m.namespaces.Reset()
	m.sources.Reset()
}

// forget drops the series of a resource that is gone.
func (m *metrics) forget(resource string) {
	m.namespaces.DeletePartialMatch(prometheus.Labels{"resource": resource})
	m.sources.DeletePartialMatch(prometheus.Labels{"resource": resource})
}
