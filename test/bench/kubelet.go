package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/imps-node/imps/pkg/dockerconfig"
	"github.com/imps-node/imps/pkg/nodecache"
	"github.com/imps-node/imps/test/cluster/cluster"
	"github.com/imps-node/imps/test/fakeaws"
	testregistry "github.com/imps-node/imps/test/registry"
)

// sizeKubelet is the size that has a kubelet ask both providers, and reads how long it says that they took.
const sizeKubelet = "kubelet"

// The series, all of many images. The kubelet remembers what it is told for a registry.
const (
	// seriesCalm is one Pod after the other, of perPod images each: the kubelet pulls those of a Pod one after the other.
	seriesCalm = "one after the other, each of another registry"
	// seriesBurst and seriesOne are Pods with one image each.
	seriesBurst = "at once, each of another registry"
	seriesOne   = "at once, all of one registry"
)

// perPod is as many as containerd ends in seconds; a hundred containers of one Pod take it minutes.
const perPod = 10

// kubeletRun is what a kubelet says of its providers.
type kubeletRun struct {
	// Beside is the module and version of ecr-credential-provider.
	Beside string   `json:"beside"`
	Series []series `json:"series"`
}

type series struct {
	Name    string       `json:"name"`
	Images  int          `json:"images"`
	Plugins []pluginSeen `json:"plugins"`
}

// pluginSeen is what became of one provider.
type pluginSeen struct {
	Name  string    `json:"name"`
	Times histogram `json:"times"`
	// Calls are those to AWS.
	Calls int `json:"calls"`
}

// histogram is one of Prometheus.
type histogram struct {
	Count   uint64   `json:"count"`
	Seconds float64  `json:"seconds"`
	Buckets []bucket `json:"buckets"`
}

// bucket counts what took no longer than its bound; the one without a bound is left out.
type bucket struct {
	Seconds float64 `json:"seconds"`
	Count   uint64  `json:"count"`
}

// within returns how many took no longer than the bound of a bucket.
func (h histogram) within(bound time.Duration) uint64 {
	for _, b := range h.Buckets {
		if b.Seconds >= bound.Seconds() {
			return b.Count
		}
	}
	return h.Count
}

// plus adds one with the same buckets, to none or another.
func (h histogram) plus(other histogram) histogram {
	sum := histogram{Count: h.Count + other.Count, Seconds: h.Seconds + other.Seconds, Buckets: slices.Clone(other.Buckets)}
	for i, b := range h.Buckets {
		sum.Buckets[i].Count += b.Count
	}
	return sum
}

// plugin returns what became of a provider in a series, nothing where there is none.
func (r *kubeletRun) plugin(series, name string) pluginSeen {
	for _, s := range r.Series {
		for _, p := range s.Plugins {
			if s.Name == series && p.Name == name {
				return p
			}
		}
	}
	return pluginSeen{}
}

// plugin is an entry of the kubelet's CredentialProviderConfig.
type plugin struct {
	name, program string
	args          []string
	// key is whom AWS takes it for, url where its AWS is, latency what that adds to each call.
	key     fakeaws.Key
	url     string
	latency time.Duration
}

// plugins are imps, and ecr-credential-provider once for each latency. A kubelet asks all of them for each image, one after the other.
func plugins(cache string) []plugin {
	all := []plugin{{name: impsProvider, program: impsProvider, args: []string{"--cache-dir=" + cache}}}
	for _, latency := range latencies {
		all = append(all, plugin{name: besidePlugin(latency), program: ecrProvider, latency: latency})
	}
	for i := range all {
		all[i].key = fakeaws.Key{AccessKeyID: fmt.Sprint("AKIABENCH", i), SecretAccessKey: "bench", Principal: all[i].name}
	}
	return all
}

func besidePlugin(latency time.Duration) string {
	return fmt.Sprintf("%s-%dms", ecrProvider, latency.Milliseconds())
}

// env is of one kind for all: imps could call AWS, too.
func (p plugin) env() []string { return awsEnv(p.key, p.url) }

// pluginConfig is the kubelet's CredentialProviderConfig.
func pluginConfig(plugins []plugin) ([]byte, error) {
	var entries []map[string]any
	for _, p := range plugins {
		var env []map[string]string
		for _, variable := range p.env() {
			name, value, _ := strings.Cut(variable, "=")
			env = append(env, map[string]string{"name": name, "value": value})
		}
		entries = append(entries, map[string]any{
			"name": p.name, "apiVersion": "credentialprovider.kubelet.k8s.io/v1", "args": p.args, "env": env,
			"matchImages": []string{"*.dkr.ecr." + ecrRegion + ".amazonaws.com"}, "defaultCacheDuration": "0s",
		})
	}
	return json.Marshal(map[string]any{
		"apiVersion": "kubelet.config.k8s.io/v1", "kind": "CredentialProviderConfig", "providers": entries,
	})
}

// kubeletBench is a node whose kubelet asks all the providers, and a registry that lets in whoever has a token of AWS.
type kubeletBench struct {
	*bench
	providers
	plugins  []plugin
	node     *cluster.Node
	registry *testregistry.Host
	// others are requests that the registry has let in with another token than that of imps.
	others atomic.Int64
}

// measureKubelet measures one run of size kubelet.
func (b *bench) measureKubelet(ctx context.Context) (err error) {
	b.run = sizeRun{Size: b.size.name, Load: load(), Kubelet: &kubeletRun{}}
	k := &kubeletBench{bench: b, providers: providers{aws: fakeaws.New()}}
	defer func() { err = errors.Join(err, k.removeFolders()) }()
	if err := k.makeFolders(); err != nil {
		return err
	}
	b.say("building the providers")
	var built providerRun
	if err := k.build(ctx, b.root, &built); err != nil {
		return err
	}
	b.run.Kubelet.Beside = built.Beside
	if b.control, err = cluster.Run(ctx, cluster.WithProgress(b.progress)); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.control.Stop()) }() // and the node with it
	b.client = b.control.Client()
	version, err := b.client.Discovery().ServerVersion()
	if err != nil {
		return fmt.Errorf("ask for the version: %w", err)
	}
	b.kubernetes = version.GitVersion

	cache := filepath.Join(k.caches, "kubelet")
	k.plugins = plugins(cache)
	for i := range k.plugins {
		p := &k.plugins[i]
		server := k.serve(p.latency)
		defer server.Close()
		p.url = server.URL
		k.aws.AddKey(p.key)
	}
	hosts := []string{ecrHost}
	for i := range b.size.images {
		hosts = append(hosts, fmt.Sprintf("%012d.dkr.ecr.%s.amazonaws.com", i, ecrRegion))
	}
	if err := k.fill(ctx, cache, hosts); err != nil {
		return err
	}
	registries, err := k.startRegistry(ctx)
	if err != nil {
		return err
	}
	defer registries.Stop()
	b.say("starting a node")
	if err := k.startNode(ctx, hosts); err != nil {
		return err
	}

	var calm, burst, one []corev1.Container
	for i, host := range hosts[1:] {
		calm = append(calm, corev1.Container{Name: fmt.Sprint("c", i), Image: host + "/calm:v1"})
		burst = append(burst, corev1.Container{Name: "c", Image: host + "/burst:v1"})
		one = append(one, corev1.Container{Name: "c", Image: fmt.Sprintf("%s/one-%d:v1", ecrHost, i)})
	}
	if err := k.pull(ctx, seriesCalm, calm, perPod); err != nil {
		return err
	}
	if err := k.pull(ctx, seriesBurst, burst, 1); err != nil {
		return err
	}
	return k.pull(ctx, seriesOne, one, 1)
}

// fill gives imps a token for each host, which AWS has granted.
func (k *kubeletBench) fill(ctx context.Context, cache string, hosts []string) error {
	request, err := requestFor(ecrHost+"/app", "")
	if err != nil {
		return err
	}
	beside := k.plugins[len(k.plugins)-1]
	q := question{
		name: beside.name, command: []string{filepath.Join(k.bin, ecrProvider)}, env: beside.env(), request: request,
		check: hit(func(username, password string) bool {
			k.token = password
			return k.aws.Opens(ecrRegion, false, username, password)
		}),
	}
	if _, _, err := q.ask(ctx); err != nil {
		return err
	}
	k.aws.Calls() // which forgets that one
	var entries []nodecache.Entry
	for _, host := range hosts {
		entries = append(entries, nodecache.Entry{
			Key: host, Username: dockerconfig.NewSensitive("AWS"), Password: dockerconfig.NewSensitive(k.token), Expires: time.Now().Add(12 * time.Hour),
		})
	}
	return write(cache, map[nodecache.Scope][]nodecache.Entry{nodecache.Node: entries})
}

// startRegistry starts the registry behind all hosts.
func (k *kubeletBench) startRegistry(ctx context.Context) (*testregistry.Hosts, error) {
	binary, err := testregistry.Build(ctx, k.root, k.bin)
	if err != nil {
		return nil, err
	}
	registries, err := testregistry.StartHosts(ctx, k.control, binary, k.bin)
	if err != nil {
		return nil, err
	}
	k.registry = registries.Host(ecrHost)
	k.registry.Guard(func(next http.Handler) http.Handler {
		return k.aws.Guard(ecrRegion, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if _, password, _ := r.BasicAuth(); password != k.token {
				k.others.Add(1)
			}
			next.ServeHTTP(w, r)
		}))
	})
	return registries, nil
}

func (k *kubeletBench) startNode(ctx context.Context, hosts []string) (err error) {
	raw, err := pluginConfig(k.plugins)
	if err != nil {
		return fmt.Errorf("encode the kubelet's configuration: %w", err)
	}
	config := filepath.Join(k.caches, "kubelet.json")
	if err := os.WriteFile(config, raw, 0o600); err != nil {
		return fmt.Errorf("write the kubelet's configuration: %w", err)
	}
	for _, p := range k.plugins {
		if p.name != p.program {
			if err := os.Symlink(p.program, filepath.Join(k.bin, p.name)); err != nil {
				return fmt.Errorf("name a provider: %w", err)
			}
		}
	}
	addresses := map[string]string{}
	for _, host := range hosts {
		addresses[host] = k.registry.Address
	}
	k.node, err = k.control.StartNode(ctx, cluster.NodeConfig{
		Name: "node", CredentialProviderConfig: config, CredentialProviderBinDir: k.bin, Registries: addresses,
	})
	return err
}

// pull has a kubelet that has just started run these containers, and reads what it says when all images are pulled.
func (k *kubeletBench) pull(ctx context.Context, name string, containers []corev1.Container, perPod int) error {
	k.say("%d images %s", len(containers), name)
	if err := k.removePods(ctx); err != nil {
		return err
	}
	// It forgets its answers, and its metrics.
	if err := k.node.RestartKubelet(ctx); err != nil {
		return err
	}
	want := k.registry.Counts().Pulled
	// The registry knows, and to ask it costs the node nothing.
	pulled := func(context.Context) error {
		if got := k.registry.Counts().Pulled; got < want {
			return fmt.Errorf("%d images are not pulled", want-got)
		}
		return nil
	}
	for some := range slices.Chunk(containers, perPod) {
		pod := &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{GenerateName: "bench-"},
			Spec:       corev1.PodSpec{NodeName: k.node.Name(), Containers: some},
		}
		if err := await(ctx, func(ctx context.Context) error { // until there is a ServiceAccount
			_, err := k.client.CoreV1().Pods(metav1.NamespaceDefault).Create(ctx, pod, metav1.CreateOptions{})
			return err
		}); err != nil {
			return fmt.Errorf("create a Pod: %w", err)
		}
		want += len(some)
		if name == seriesCalm {
			if err := await(ctx, pulled); err != nil {
				return err
			}
		}
	}
	if err := await(ctx, pulled); err != nil {
		return err
	}
	// The kubelet tries credentials in the order of its providers, and imps is the first.
	if n := k.others.Load(); n > 0 {
		return fmt.Errorf("imps has missed: %d requests to the registry had the token of another provider", n)
	}
	text, err := k.node.Metrics(ctx)
	if err != nil {
		return fmt.Errorf("read the kubelet's metrics: %w", err)
	}
	times, failures, err := parseMetrics(text)
	if err != nil {
		return err
	}
	calls := map[string]int{}
	for _, call := range k.aws.Calls() {
		calls[call.Principal]++
	}
	s := series{Name: name, Images: len(containers)}
	for _, p := range k.plugins {
		if times[p.name].Count == 0 || failures[p.name] > 0 {
			return fmt.Errorf("%s was started %d times, and has failed %g times", p.name, times[p.name].Count, failures[p.name])
		}
		s.Plugins = append(s.Plugins, pluginSeen{Name: p.name, Times: times[p.name], Calls: calls[p.name]})
	}
	k.run.Kubelet.Series = append(k.run.Kubelet.Series, s)
	return nil
}

// removePods removes those of the series before, whose work must not be in the next.
func (k *kubeletBench) removePods(ctx context.Context) error {
	pods, grace := k.client.CoreV1().Pods(metav1.NamespaceDefault), int64(1)
	if err := pods.DeleteCollection(ctx, metav1.DeleteOptions{GracePeriodSeconds: &grace}, metav1.ListOptions{}); err != nil {
		return fmt.Errorf("delete the Pods: %w", err)
	}
	return await(ctx, func(ctx context.Context) error {
		left, err := pods.List(ctx, metav1.ListOptions{})
		if err == nil && len(left.Items) > 0 {
			err = fmt.Errorf("%d Pods do not end", len(left.Items))
		}
		return err
	})
}

// parseMetrics returns what a kubelet says of its providers in Prometheus' text format, by their names.
func parseMetrics(text string) (times map[string]histogram, failures map[string]float64, err error) {
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(text))
	if err != nil {
		return nil, nil, fmt.Errorf("read the kubelet's metrics: %w", err)
	}
	times, failures = map[string]histogram{}, map[string]float64{}
	for _, metric := range families["kubelet_credential_provider_plugin_duration"].GetMetric() {
		seen := metric.GetHistogram()
		h := histogram{Count: seen.GetSampleCount(), Seconds: seen.GetSampleSum()}
		for _, b := range seen.GetBucket() {
			if !math.IsInf(b.GetUpperBound(), 1) {
				h.Buckets = append(h.Buckets, bucket{Seconds: b.GetUpperBound(), Count: b.GetCumulativeCount()})
			}
		}
		times[metric.GetLabel()[0].GetValue()] = h
	}
	for _, metric := range families["kubelet_credential_provider_plugin_errors_total"].GetMetric() {
		failures[metric.GetLabel()[0].GetValue()] = metric.GetCounter().GetValue()
	}
	return times, failures, nil
}

// kubeletRules are those of size kubelet.
func kubeletRules() (rules []rule) {
	imps := func(r sizeRun, series string) pluginSeen { return r.Kubelet.plugin(series, impsProvider) }
	for _, series := range []string{seriesCalm, seriesBurst} {
		slower := func(bound time.Duration) func(sizeRun) float64 {
			return func(r sizeRun) float64 {
				times := imps(r, series).Times
				return 100 * float64(times.Count-times.within(bound)) / float64(times.Count)
			}
		}
		rules = append(rules,
			rule{name: "imps takes more than 5 ms, images " + series, unit: "%", seen: slower(5 * time.Millisecond), limit: atMost(5)},
			rule{name: "imps takes more than 50 ms, images " + series, unit: "%", seen: slower(50 * time.Millisecond), limit: atMost(0)})
	}
	return append(rules, rule{name: "calls of imps to AWS", seen: func(r sizeRun) float64 {
		return float64(imps(r, seriesCalm).Calls + imps(r, seriesBurst).Calls + imps(r, seriesOne).Calls)
	}, limit: atMost(0)})
}

// pluginTable lists what kubelets say in a series, all runs together.
func pluginTable(runs []sizeRun, s series) table {
	t := table{title: fmt.Sprintf("%d images %s: how often a provider was started, in all runs, and took no longer than", s.Images, s.Name)}
	var heads []string
	for _, p := range s.Plugins {
		var all histogram
		calls := 0
		for _, r := range runs {
			seen := r.Kubelet.plugin(s.Name, p.Name)
			all, calls = all.plus(seen.Times), calls+seen.Calls
		}
		heads = []string{"", "calls to AWS", "starts", "mean [ms]"}
		cells := []string{p.Name, fmt.Sprint(calls), fmt.Sprint(all.Count), figure(1000 * all.Seconds / float64(all.Count))}
		for _, b := range all.Buckets {
			if b.Seconds > 1 { // what takes longer is missing from the starts
				break
			}
			heads, cells = append(heads, figure(1000*b.Seconds)+" ms"), append(cells, fmt.Sprint(b.Count))
		}
		t.add(cells...)
	}
	t.rows = slices.Insert(t.rows, 0, heads)
	return t
}
