package main

import (
	"context"
	"fmt"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	impsync "github.com/imps-node/imps/pkg/sync"
	"github.com/imps-node/imps/test/imps"
)

// size is how large the objects of a kind are on their way to who watches them.
type size struct {
	What      string `json:"what"`
	Objects   int    `json:"objects"`
	MeanBytes int    `json:"meanBytes"`
}

// weigh measures the objects that imps watches and writes: in protobuf, or JSON where there
// is no other form.
func (s *simulation) weigh(ctx context.Context) error {
	add := func(what string, n int, sizeOf func(int) int) {
		total := 0
		for i := range n {
			total += sizeOf(i)
		}
		s.result.Sizes = append(s.result.Sizes, size{what, n, total / max(n, 1)})
	}
	for _, kind := range []struct {
		what     string
		resource schema.GroupVersionResource
		labels   string
	}{
		{"namespace, as metadata", impsync.NamespaceResource, ""},
		{"node, as metadata", impsync.NodeResource, ""},
		{"target Secret, as metadata", impsync.SecretResource, impsync.LabelOwnerUID},
	} {
		list, err := s.metadata.Resource(kind.resource).List(ctx, metav1.ListOptions{LabelSelector: kind.labels})
		if err != nil {
			return fmt.Errorf("list %s: %w", kind.what, err)
		}
		add(kind.what, len(list.Items), func(i int) int { return list.Items[i].Size() })
	}
	for _, kind := range []struct{ what, namespace, labels string }{
		{"target Secret", "", impsync.LabelOwnerUID},
		{"rendered Secret", imps.RenderedNamespace, impsync.LabelComponent},
		{"state Secret", imps.SystemNamespace, impsync.LabelComponent},
	} {
		list, err := s.core.CoreV1().Secrets(kind.namespace).List(ctx, metav1.ListOptions{LabelSelector: kind.labels})
		if err != nil {
			return fmt.Errorf("list %s: %w", kind.what, err)
		}
		add(kind.what, len(list.Items), func(i int) int { return list.Items[i].Size() })
	}
	reports, err := s.core.CoreV1().ConfigMaps(imps.SystemNamespace).List(ctx, metav1.ListOptions{LabelSelector: impsync.LabelComponent})
	if err != nil {
		return fmt.Errorf("list the node reports: %w", err)
	}
	add("node report", len(reports.Items), func(i int) int { return reports.Items[i].Size() })
	resources, err := s.dynamic.Resource(v1alpha1.Resource).List(ctx, metav1.ListOptions{})
	if err != nil {
		return fmt.Errorf("list the ImagePullSecrets: %w", err)
	}
	for i := range resources.Items {
		raw, err := resources.Items[i].MarshalJSON()
		if err != nil {
			return fmt.Errorf("encode an ImagePullSecret: %w", err)
		}
		add("ImagePullSecret "+resources.Items[i].GetName()+", as JSON", 1, func(int) int { return len(raw) })
	}
	return nil
}
