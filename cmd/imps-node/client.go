package main

import (
	"fmt"
	"math"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// runClient returns the connection of a process that runs in the cluster, or of the one
// that the file names. client-go reads an in-cluster token anew when its file changes.
func runClient(kubeconfig string, qps float32, purpose string) (*rest.Config, error) {
	if kubeconfig != "" {
		return personClient(kubeconfig, qps, purpose)
	}
	config, err := rest.InClusterConfig()
	if err != nil {
		return nil, fmt.Errorf("--kubeconfig: none is given, and this is no Pod of a cluster: %w", err)
	}
	return tune(config, qps, purpose), nil
}

// personClient returns the connection that kubectl would use, or the one that the file names.
func personClient(kubeconfig string, qps float32, purpose string) (*rest.Config, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = kubeconfig
	config, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, nil).ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("--kubeconfig: %w", err)
	}
	return tune(config, qps, purpose), nil
}

func tune(config *rest.Config, qps float32, purpose string) *rest.Config {
	config.UserAgent = fmt.Sprintf("imps-node/%s (%s)", version, purpose)
	config.QPS, config.Burst = -1, 0
	if qps > 0 {
		config.QPS, config.Burst = qps, int(math.Ceil(2*float64(qps)))
	}
	// The server's warnings come with single requests, up to one for every Secret.
	config.WarningHandlerWithContext = rest.NoWarnings{}
	return config
}
