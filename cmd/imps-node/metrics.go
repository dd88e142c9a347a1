package main

import (
	"context"
	"net/url"
	"runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	clientmetrics "k8s.io/client-go/tools/metrics"
	"k8s.io/client-go/util/workqueue"
)

// newRegistry returns a registry with what is known of the process itself.
func newRegistry() *prometheus.Registry {
	build := prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "imps_build_info", Help: "Always 1; its labels tell what runs.",
	}, []string{"version", "goversion"})
	build.WithLabelValues(version, runtime.Version()).Set(1)
	registry := prometheus.NewRegistry()
	registry.MustRegister(build, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return registry
}

// instrumentClientGo has client-go count its requests and queues. client-go takes the
// first call of a process only.
func instrumentClientGo(registry prometheus.Registerer) {
	requests, queues := newClientGoMetrics(registry)
	clientmetrics.Register(clientmetrics.RegisterOpts{RequestLatency: requests, RequestResult: requests})
	workqueue.SetProvider(queues)
}

// newClientGoMetrics registers what client-go counts, under the names that the components
// of Kubernetes use.
func newClientGoMetrics(registry prometheus.Registerer) (requestMetrics, queueMetrics) {
	seconds := []float64{.001, .01, .1, 1, 10, 60}
	requests := requestMetrics{
		latency: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "rest_client_request_duration_seconds", Help: "Time of requests to the API server, by verb and host.",
			Buckets: []float64{.002, .005, .01, .025, .05, .1, .25, .5, 1, 5, 15, 60},
		}, []string{"verb", "host"}),
		results: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "rest_client_requests_total", Help: "Requests to the API server, by status code, method and host.",
		}, []string{"code", "method", "host"}),
	}
	name := []string{"name"}
	queues := queueMetrics{
		depth: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "workqueue_depth", Help: "Items in the queue.",
		}, name),
		adds: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "workqueue_adds_total", Help: "Items added to the queue.",
		}, name),
		latency: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "workqueue_queue_duration_seconds", Help: "How long items wait in the queue.", Buckets: seconds,
		}, name),
		work: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "workqueue_work_duration_seconds", Help: "How long the work on an item takes.", Buckets: seconds,
		}, name),
		unfinished: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "workqueue_unfinished_work_seconds", Help: "Sum of the time that the work in progress has taken so far.",
		}, name),
		longest: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "workqueue_longest_running_processor_seconds", Help: "Time that the longest work in progress has taken so far.",
		}, name),
		retries: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "workqueue_retries_total", Help: "Items put back into the queue after an error.",
		}, name),
	}
	registry.MustRegister(requests.latency, requests.results,
		queues.depth, queues.adds, queues.latency, queues.work, queues.unfinished, queues.longest, queues.retries)
	return requests, queues
}

// requestMetrics is client-go's LatencyMetric and ResultMetric. No label holds a URL:
// those have names of objects in them.
type requestMetrics struct {
	latency *prometheus.HistogramVec
	results *prometheus.CounterVec
}

func (m requestMetrics) Observe(_ context.Context, verb string, u url.URL, latency time.Duration) {
	m.latency.WithLabelValues(verb, u.Host).Observe(latency.Seconds())
}

func (m requestMetrics) Increment(_ context.Context, code, method, host string) {
	m.results.WithLabelValues(code, method, host).Inc()
}

// queueMetrics is client-go's MetricsProvider for queues.
type queueMetrics struct {
	depth, unfinished, longest *prometheus.GaugeVec
	adds, retries              *prometheus.CounterVec
	latency, work              *prometheus.HistogramVec
}

func (m queueMetrics) NewDepthMetric(name string) workqueue.GaugeMetric {
	return m.depth.WithLabelValues(name)
}

func (m queueMetrics) NewAddsMetric(name string) workqueue.CounterMetric {
	return m.adds.WithLabelValues(name)
}

func (m queueMetrics) NewLatencyMetric(name string) workqueue.HistogramMetric {
	return m.latency.WithLabelValues(name)
}

func (m queueMetrics) NewWorkDurationMetric(name string) workqueue.HistogramMetric {
	return m.work.WithLabelValues(name)
}

func (m queueMetrics) NewUnfinishedWorkSecondsMetric(name string) workqueue.SettableGaugeMetric {
	return m.unfinished.WithLabelValues(name)
}

func (m queueMetrics) NewLongestRunningProcessorSecondsMetric(name string) workqueue.SettableGaugeMetric {
	return m.longest.WithLabelValues(name)
}

func (m queueMetrics) NewRetriesMetric(name string) workqueue.CounterMetric {
	return m.retries.WithLabelValues(name)
}
