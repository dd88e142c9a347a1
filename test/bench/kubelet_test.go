package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/imps-node/imps/test/cluster/cluster"
)

// It asserts counts only: times depend on who else uses the machine.
func TestBenchHasAKubeletAskBothProviders(t *testing.T) {
	cluster.NeedNode(t)
	const images = perPod + 1
	root, err := repository(t.Context())
	require.NoError(t, err)
	var progress bytes.Buffer
	b := &bench{size: size{name: sizeKubelet, images: images}, root: root, progress: &progress, begin: time.Now()}
	require.NoError(t, b.measureKubelet(t.Context()), &progress)
	require.Contains(t, b.run.Kubelet.Beside, "k8s.io/cloud-provider-aws v")

	var names []string
	for _, s := range b.run.Kubelet.Series {
		names = append(names, s.Name)
		require.Equal(t, images, s.Images)
		require.Len(t, s.Plugins, 1+len(latencies))
		for _, p := range s.Plugins {
			if s.Name == seriesOne {
				require.Positive(t, p.Times.Count, p.Name)
				require.LessOrEqual(t, p.Times.Count, uint64(images), p.Name)
			} else {
				require.EqualValues(t, images, p.Times.Count, "%s: %s", p.Name, s.Name)
			}
			if p.Name == impsProvider {
				require.Zero(t, p.Calls)
			} else {
				require.EqualValues(t, p.Times.Count, p.Calls, "%s: %s", p.Name, s.Name)
			}
			require.Positive(t, p.Times.Seconds)
		}
	}
	require.Equal(t, []string{seriesCalm, seriesBurst, seriesOne}, names)

	r := &result{Runs: []sizeRun{b.run}}
	raw, err := json.Marshal(r)
	require.NoError(t, err)
	read := &result{}
	require.NoError(t, json.Unmarshal(raw, read))
	require.Equal(t, r, read)
	var out bytes.Buffer
	require.NoError(t, r.print(&out, true))
	for _, name := range []string{seriesCalm, seriesBurst, seriesOne, impsProvider, besidePlugin(0)} {
		require.Contains(t, out.String(), name)
	}
	for _, g := range r.goals() {
		require.Contains(t, out.String(), g.Name)
	}
	left, err := filepath.Glob(fmt.Sprintf("/dev/shm/imps-bench-%d-*", os.Getpid()))
	require.NoError(t, err)
	require.Empty(t, left, "folders that are left")
}

func TestWhatAKubeletSaysIsRead(t *testing.T) {
	t.Parallel()
	const said = `# HELP kubelet_credential_provider_plugin_duration [ALPHA] Duration of execution in seconds for credential provider plugin
# TYPE kubelet_credential_provider_plugin_duration histogram
kubelet_credential_provider_plugin_duration_bucket{plugin_name="a",le="0.005"} 2
kubelet_credential_provider_plugin_duration_bucket{plugin_name="a",le="0.01"} 3
kubelet_credential_provider_plugin_duration_bucket{plugin_name="a",le="+Inf"} 4
kubelet_credential_provider_plugin_duration_sum{plugin_name="a"} 0.5
kubelet_credential_provider_plugin_duration_count{plugin_name="a"} 4
kubelet_credential_provider_plugin_duration_bucket{plugin_name="b",le="0.005"} 0
kubelet_credential_provider_plugin_duration_bucket{plugin_name="b",le="0.01"} 0
kubelet_credential_provider_plugin_duration_bucket{plugin_name="b",le="+Inf"} 1
kubelet_credential_provider_plugin_duration_sum{plugin_name="b"} 2
kubelet_credential_provider_plugin_duration_count{plugin_name="b"} 1
`
	const failed = `# TYPE kubelet_credential_provider_plugin_errors_total counter
kubelet_credential_provider_plugin_errors_total{plugin_name="b"} 1
`
	a := histogram{Count: 4, Seconds: 0.5, Buckets: []bucket{{0.005, 2}, {0.01, 3}}}
	b := histogram{Count: 1, Seconds: 2, Buckets: []bucket{{0.005, 0}, {0.01, 0}}}
	for name, tt := range map[string]struct {
		text     string
		times    map[string]histogram
		failures map[string]float64
	}{
		"times":                  {said, map[string]histogram{"a": a, "b": b}, map[string]float64{}},
		"times and failures":     {said + failed, map[string]histogram{"a": a, "b": b}, map[string]float64{"b": 1}},
		"nothing of a provider":  {"other 1\n", map[string]histogram{}, map[string]float64{}},
		"nothing of anything":    {"", map[string]histogram{}, map[string]float64{}},
		"something that is none": {"{", nil, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			times, failures, err := parseMetrics(tt.text)
			require.Equal(t, tt.times == nil, err != nil)
			require.Equal(t, tt.times, times)
			require.Equal(t, tt.failures, failures)
		})
	}
}

func TestHistogramsAreAdded(t *testing.T) {
	t.Parallel()
	one := histogram{Count: 4, Seconds: 0.5, Buckets: []bucket{{0.005, 2}, {0.01, 3}}}
	sum := histogram{}.plus(one)
	require.Equal(t, one, sum)
	sum = sum.plus(one)
	require.Equal(t, histogram{Count: 8, Seconds: 1, Buckets: []bucket{{0.005, 4}, {0.01, 6}}}, sum)
	require.EqualValues(t, 2, one.Buckets[0].Count, "it is as it was")
	require.EqualValues(t, 4, sum.within(5*time.Millisecond))
	require.EqualValues(t, 6, sum.within(10*time.Millisecond))
	require.EqualValues(t, 8, sum.within(time.Second))
}

func TestGoalsOfTheKubelet(t *testing.T) {
	t.Parallel()
	in := func(name string, within5, within50 uint64, calls int) series {
		return series{Name: name, Plugins: []pluginSeen{
			{Name: impsProvider, Times: histogram{Count: 20, Buckets: []bucket{{0.005, within5}, {0.05, within50}}}, Calls: calls},
			{Name: besidePlugin(0), Calls: 20},
		}}
	}
	var seen []float64
	var met []bool
	for _, g := range goalsOf([]sizeRun{{Size: sizeKubelet, Kubelet: &kubeletRun{
		Series: []series{in(seriesCalm, 19, 20, 0), in(seriesBurst, 1, 19, 0), in(seriesOne, 0, 0, 2)},
	}}}) {
		seen, met = append(seen, g.Seen), append(met, g.Met)
	}
	require.Equal(t, []float64{5, 0, 95, 5, 2}, seen)
	require.Equal(t, []bool{true, true, false, false, false}, met)
}

func TestTheKubeletAsksImpsFirst(t *testing.T) {
	t.Parallel()
	raw, err := pluginConfig(plugins("/cache"))
	require.NoError(t, err)
	var config struct {
		Providers []struct {
			Name string
			Args []string
			Env  []struct{ Name, Value string }
		}
	}
	require.NoError(t, json.Unmarshal(raw, &config))
	require.Len(t, config.Providers, 1+len(latencies))
	require.Equal(t, impsProvider, config.Providers[0].Name)
	require.Equal(t, []string{"--cache-dir=/cache"}, config.Providers[0].Args)
	keys := map[string]bool{}
	for _, p := range config.Providers {
		require.Equal(t, "AWS_ACCESS_KEY_ID", p.Env[0].Name)
		keys[p.Env[0].Value] = true
	}
	require.Len(t, keys, len(config.Providers), "AWS can tell them apart")
}
